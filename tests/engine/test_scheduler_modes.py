"""Our parts of the scheduler in every way in which vLLM drives one, with a model that counts.

What must hold in each: a client gets the tokens that were sampled, in order; no block is leaked, no
request is lost. The runner's KV shows who reads what is not his (`fake_runner`).
"""

import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from counting_engine import BLOCK_SIZE, MODES, CountingEngine, Mode, token_at
from vllm.v1.engine import FinishReason

Make = Callable[..., CountingEngine]

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Mode:
    mode: Mode = request.param
    return mode


@pytest.fixture
def make(mode: Mode) -> Iterator[Make]:
    """Makes engines, of which nothing may be left in the end."""
    engines: list[CountingEngine] = []

    def make(num_blocks: int = 100, **options: Any) -> CountingEngine:
        engines.append(CountingEngine(num_blocks, mode=mode, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.check_settled()
        engine.scheduler.shutdown()


def expected(num_tokens: int, num_more: int) -> list[int]:
    """Of an answer after so many tokens of prompt and answer."""
    return [token_at(position) for position in range(num_tokens, num_tokens + num_more)]


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "few-blocks": {"num_blocks": 12},
    "priority": {"scheduling_policy": "priority"},
    "priority-few-blocks": {"scheduling_policy": "priority", "num_blocks": 12},
    "cached": {"enable_prefix_caching": True, "num_blocks": 20},
    "drafts": {"speculative_config": NGRAM},
    "drafts-few-blocks": {"speculative_config": NGRAM, "num_blocks": 12},
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_comes_is_answered_exactly(make: Make, kind: str, seed: int) -> None:
    rng = random.Random(f"{kind} {seed}")
    options: dict[str, Any] = {"max_num_batched_tokens": 96, "max_num_seqs": 8}
    engine = make(**(options | KINDS[kind]))
    wanted: dict[str, list[int]] = {}
    aborted = set()
    for index in range(24):
        name, num_tokens, num_more = f"r{index}", rng.randint(1, 200), rng.randint(1, 12)
        given = tuple(rng.choices(range(5, 99), k=rng.choice([0, 0, 1, 5])))
        now_s = time.time()
        engine.add(
            name,
            num_tokens,
            num_more,
            given=given,
            limit_s=rng.choice([None, 1e-9, 10.0]),
            priority=round(1000 * (now_s + rng.uniform(-1.0, 3.0))),
            arrival_time=now_s,
            prompt=rng.choices(range(5, 8), k=num_tokens) if num_tokens < 64 else None,
        )
        wanted[name] = expected(num_tokens + len(given), num_more)
        for _ in range(rng.randint(0, 3)):
            if engine.has_work:
                engine.step_as_engine_core()
        running = [each for each in wanted if each not in engine.ended]
        if running and engine.has_work and rng.random() < 0.2:
            aborted.add(rng.choice(running))
            engine.abort(*aborted)
    engine.run(1000)
    for name, tokens in wanted.items():
        if name in aborted:
            assert engine.tokens[name] == tokens[: len(engine.tokens[name])]
        else:
            assert engine.tokens[name] == tokens, name


def test_the_random_cases_preempt_and_overlap(mode: Mode) -> None:
    """What they are for does happen in them."""
    engine = CountingEngine(8, mode=mode, max_num_batched_tokens=96)
    requests = [engine.add(f"r{index}", 60, 60) for index in range(4)]
    num_under_way = 0
    while engine.has_work:
        engine.step_as_engine_core()
        num_under_way = max(num_under_way, engine.num_under_way)
    assert sum(request.num_preemptions for request in requests) > 0
    assert num_under_way == mode.is_async
    engine.check_settled()


LETTERS = "[ab]{6}"


def constrained(engine: CountingEngine, name: str, given: str = "") -> None:
    tokens = tuple(engine.tokenizer.convert_tokens_to_ids(list(given)))
    engine.constrained(name, 40, 20, LETTERS, given=tokens)


@pytest.mark.parametrize("options", [{}, {"speculative_config": NGRAM}], ids=["plain", "drafts"])
def test_grammars_go_on_where_they_were(make: Make, options: dict[str, Any]) -> None:
    engine = make(**options)
    constrained(engine, "new")
    engine.add("free", 30, 10)
    engine.step_as_engine_core()
    constrained(engine, "moved", given="abba")
    engine.run()
    assert len(engine.text(engine.tokens["new"])) == 6
    assert set(engine.text(engine.tokens["new"])) <= {"a", "b"}
    assert len(engine.text(engine.tokens["moved"])) == 2
    assert engine.last["new"].finish_reason == FinishReason.STOP
    assert engine.last["moved"].finish_reason == FinishReason.STOP
    assert engine.tokens["free"] == expected(30, 10)


@pytest.mark.parametrize("is_idle", [True, False], ids=["idle", "busy"])
@pytest.mark.parametrize("given", ["abc", "ccc", "abababab"])
def test_what_a_grammar_forbids_ends_that_request_alone(
    make: Make, given: str, is_idle: bool
) -> None:
    """An idle engine may schedule twice before it hears of the first step."""
    engine = make()
    engine.add("free", 30, 10)
    if not is_idle:
        engine.step_as_engine_core()
    constrained(engine, "bad", given=given)
    constrained(engine, "good")
    engine.run()
    assert engine.last["bad"].finish_reason == FinishReason.ERROR
    assert engine.tokens["bad"] == []
    assert "bad" not in engine.runner.computed
    assert len(engine.text(engine.tokens["good"])) == 6
    assert engine.tokens["free"] == expected(30, 10)


def test_a_grammar_survives_preemption(make: Make) -> None:
    engine = make(num_blocks=5)
    engine.add("first", 2 * BLOCK_SIZE - 4, 20)
    constrained(engine, "second")
    engine.run()
    assert len(engine.text(engine.tokens["second"])) == 6
    assert engine.tokens["first"] == expected(2 * BLOCK_SIZE - 4, 20)


@pytest.mark.parametrize("options", [{}, {"speculative_config": NGRAM}], ids=["plain", "drafts"])
def test_samples_tell_prompts_from_answers(make: Make, options: dict[str, Any]) -> None:
    """An answer counts once in each step, however many tokens of its draft are checked there."""
    engine = make(max_num_batched_tokens=100, **options)
    engine.add("long", 150, 30)
    engine.add("short", 20, 10)
    engine.add("moved", 20, 10, given=(7, 8, 9))
    engine.run()
    assert sum(sample.num_prefill_tokens for sample in engine.samples) == 150 + 20 + 23
    assert max(sample.num_decodes for sample in engine.samples) == 3
    assert any(sample.num_draft_tokens for sample in engine.samples) == bool(options)
    if not options:
        assert sum(sample.num_decodes for sample in engine.samples) == 29 + 9 + 9


@pytest.mark.parametrize(
    ("long_priority", "given", "last"),
    [(9000, (), "long"), (9000, (7, 8), "long"), (0, (), "short-9")],
    ids=["urgent-ones-pass", "also-with-tokens", "not-one-that-is-late-enough"],
)
def test_urgent_prompts_pass_a_long_one(
    make: Make, long_priority: int, given: tuple[int, ...], last: str
) -> None:
    options: dict[str, Any] = {"scheduling_policy": "priority", "max_model_len": 4096}
    engine = make(200, **options)
    engine.add("long", 4000, 1, given=given, priority=long_priority, arrival_time=time.time())
    engine.step_as_engine_core()
    for index in range(10):
        engine.add(f"short-{index}", 20, 1, priority=100 + index, arrival_time=time.time())
    engine.run()
    assert engine.ended[-1] == last
    assert engine.tokens["long"] == expected(4000 + len(given), 1)
