"""A prompt read by one engine and answered by another, however vLLM drives their schedulers."""

import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from counting_engine import MODES, Mode, token_at
from engine_pair import EnginePair
from vllm.v1.engine import FinishReason

Make = Callable[..., EnginePair]
MTP = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
"""With `num_mtp_modules`."""


@pytest.fixture(params=MODES)
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes pairs of which nothing may be left in the end."""
    pairs: list[EnginePair] = []

    def make(**options: Any) -> EnginePair:
        mode: Mode = request.param
        pairs.append(EnginePair(mode, **options))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.check_settled()


def expected(num_tokens: int, num_more: int) -> list[int]:
    return [token_at(position) for position in range(num_tokens, num_tokens + num_more)]


@pytest.mark.parametrize("fails", [False, True], ids=["read", "failed-read"])
def test_answers_go_on_after_their_kv_has_come(make: Make, fails: bool) -> None:
    pair = make()
    lengths = {"short": 20, "block": 32, "long": 200}
    for name, num_tokens in lengths.items():
        pair.ask(name, num_tokens, 12)
    if fails:
        pair.reads.failing = {"block", "long"}
        for name in pair.reads.failing:
            pair.frees_late(name)
    pair.run()
    for name, num_tokens in lengths.items():
        assert pair.tokens[name] == expected(num_tokens, 12), name


@pytest.mark.parametrize("fails", [False, True], ids=["read", "failed-read"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"num_decode_blocks": 8}, id="decode-runs-out"),
        pytest.param({"speculative_config": MTP, "num_mtp_modules": 3}, id="mtp"),
    ],
)
def test_grammars_go_on_in_decode(make: Make, options: dict[str, Any], fails: bool) -> None:
    pair = make(**options)
    for name in ("first", "second", "third"):
        pair.ask(name, 60, 40, regex="[ab]{20}")
        if fails:
            pair.reads.failing.add(name)
            pair.frees_late(name)
    pair.run()
    for name in ("first", "second", "third"):
        text = pair.decode.text(pair.tokens[name])
        assert re.fullmatch("[ab]{20}", text), name
        assert pair.decode.last[name].finish_reason == FinishReason.STOP


@pytest.mark.parametrize("num_steps", range(9))
def test_an_answer_that_is_broken_off_leaves_nothing(make: Make, num_steps: int) -> None:
    """Wherever it is: in prefill, under way, or in decode."""
    pair = make()
    pair.ask("gone", 100, 12)
    pair.ask("stays", 100, 12)
    for _ in range(num_steps):
        pair.step()
    pair.abort("gone")
    pair.run()
    assert pair.tokens["stays"] == expected(100, 12)
    assert pair.tokens["gone"] == expected(100, 12)[: len(pair.tokens["gone"])]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"num_decode_blocks": 14}, id="decode-runs-out"),
        pytest.param({"num_blocks": 14}, id="both-run-out"),
        pytest.param({"speculative_config": MTP}, id="drafts"),
        pytest.param({"speculative_config": MTP, "num_mtp_modules": 3}, id="mtp"),
        pytest.param({"enable_prefix_caching": True}, id="cached"),
        pytest.param({"scheduling_policy": "priority", "num_blocks": 14}, id="priority"),
    ],
)
def test_whatever_comes_is_answered_exactly(make: Make, options: dict[str, Any], seed: int) -> None:
    rng = random.Random(seed)
    pair = make(max_num_batched_tokens=96, **options)
    wanted = {}
    for index in range(16):
        name, num_tokens, num_more = f"r{index}", rng.randint(1, 180), rng.randint(2, 30)
        wanted[name] = expected(num_tokens, num_more)
        pair.ask(name, num_tokens, num_more)
        if rng.random() < 0.2:
            pair.reads.failing.add(name)
            pair.frees_late(name)
        for _ in range(rng.randint(0, 2)):
            pair.step()
        if rng.random() < 0.15:
            pair.abort(rng.choice(list(wanted)))
    pair.run(2000)
    for name, tokens in wanted.items():
        got = pair.tokens[name]
        assert got == (tokens[: len(got)] if name in pair.aborted else tokens), name


@pytest.mark.parametrize(("num_modules", "num_dropped"), [(1, 0), (2, 2), (3, 2)])
def test_mtp_of_several_modules_has_its_first_token_from_decode(
    make: Make, num_modules: int, num_dropped: int
) -> None:
    """Prefill does not read the tokens that the modules look ahead to: it answers a shorter one."""
    pair = make(speculative_config=MTP, num_mtp_modules=num_modules)
    assert pair.num_dropped == num_dropped
    connector = pair.prefill.scheduler.connector.connector_scheduler
    assert connector._prefill_backoff() == num_dropped
    pair.ask("six", 6, 5)
    pair.ask("two", 2, 5)
    pair.run()
    assert pair.prefill.tokens["six"] == [token_at(6 - num_dropped)]
    assert pair.tokens["six"] == expected(6, 5)
    assert pair.tokens["two"] == expected(2, 5)
    assert pair.decode.last["six"].finish_reason == FinishReason.LENGTH
