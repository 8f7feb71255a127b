"""Long prompts among answers: vLLM's own scheduler, and a model whose steps take what we say."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from counting_engine import CUDA, MODES, CountingEngine, Mode, token_at
from vllm.v1.request import RequestStatus

from engine import steps
from engine.step_limit import IDLE_FACTOR, LEAST_PIECE

BUDGET = 1024
LIMIT_S = 0.1
LONG = 3000
FITS = 800
"""Tokens of a prompt, beside answers."""


class TimedEngine(CountingEngine):
    """Owns the clock of its steps."""

    def __init__(self, **options: Any) -> None:
        defaults = {"max_num_batched_tokens": BUDGET, "max_model_len": 4096}
        super().__init__(num_blocks=1000, **(defaults | options))
        self.now_s = 0.0

    def end(self) -> None:
        scheduled, _ = self._under_way[0]
        self.now_s += 0.02 + 0.0001 * sum(scheduled.num_scheduled_tokens.values())
        super().end()

    def writes(self, num_answers: int = 1) -> None:
        """Begins with answers that go on for long."""
        for index in range(num_answers):
            self.add(f"answer-{index}", 10, 500)
        self.step()

    def pieces(self, request_id: str) -> list[int]:
        """Of a prompt, until its first token."""
        found = []
        while not self.tokens[request_id]:
            found.append(self.step().get(request_id, 0))
        return found


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Mode:
    mode: Mode = request.param
    return mode


@pytest.fixture
def engine(
    mode: Mode, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TimedEngine]:
    engine = TimedEngine(mode=mode, **getattr(request, "param", {}))
    monkeypatch.setattr(steps, "time", SimpleNamespace(monotonic=lambda: engine.now_s))
    yield engine
    engine.scheduler.shutdown()


def test_the_pieces_of_a_long_prompt_come_to_what_fits(engine: TimedEngine) -> None:
    engine.writes()
    engine.add("long", LONG, 2, limit_s=LIMIT_S)
    pieces = engine.pieces("long")
    assert pieces[:4] == [64, 128, 256, 512]
    assert all(512 < piece <= FITS for piece in pieces[4:-1])
    assert sum(pieces) == LONG
    assert len(engine.tokens["answer-0"]) == 1 + len(pieces)
    # Learned once, the next one has it from the start.
    engine.add("next", LONG, 2, limit_s=LIMIT_S)
    assert engine.pieces("next")[0] == pytest.approx(FITS, rel=0.05)


def test_without_a_limit_a_prompt_takes_what_a_step_has(engine: TimedEngine) -> None:
    engine.writes()
    engine.add("long", LONG, 2)
    assert engine.pieces("long") == [BUDGET - 1, BUDGET - 1, LONG - 2 * (BUDGET - 1)]


def test_while_nobody_writes_the_limit_is_longer(engine: TimedEngine) -> None:
    for name in ("first", "second", "third", "fourth"):
        engine.add(name, LONG, 2, limit_s=LIMIT_S / IDLE_FACTOR)
    steps_read = [sum(engine.step().values()) for _ in range(8)]
    assert steps_read[:4] == [64, 128, 256, 512]
    assert all(0.9 * FITS < each <= FITS for each in steps_read[6:]), steps_read
    # Once somebody does, the steps are soon short again.
    engine.writes()
    steps_read = [sum(engine.step().values()) for _ in range(8)]
    assert all(each < 0.4 * FITS for each in steps_read[5:]), steps_read


def test_an_answer_whose_kv_is_under_way_is_not_held_up_either(engine: TimedEngine) -> None:
    coming = engine.add("coming", 10, 5)
    engine.scheduler.waiting.remove_requests([coming])
    engine.add("long", LONG, 2, limit_s=LIMIT_S)
    engine.scheduler.kv_holding_waiting.add_request(coming)
    coming.status = RequestStatus.WAITING_FOR_REMOTE_KVS
    assert engine.step() == {"long": LEAST_PIECE}


def test_the_strictest_limit_counts(engine: TimedEngine) -> None:
    engine.writes()
    engine.add("patient", LONG, 2, limit_s=1.0)
    engine.add("strict", LONG, 2, limit_s=LIMIT_S)
    found = [engine.step() for _ in range(6)]
    together = [step.get("patient", 0) + step.get("strict", 0) for step in found]
    assert together[:4] == [64, 128, 256, 512]
    assert together[5] == pytest.approx(FITS, rel=0.05)


def test_prompts_share_the_piece_and_none_starts_that_has_no_room(engine: TimedEngine) -> None:
    engine.writes()
    for name in ("first", "second", "third"):
        engine.add(name, LONG, 2, limit_s=LIMIT_S)
    assert engine.step() == {"answer-0": 1, "first": 64}
    assert engine.step() == {"answer-0": 1, "first": 64, "second": 64}
    assert engine.step() == {"answer-0": 1, "first": 85, "second": 85, "third": 85}


def test_whoever_has_no_limit_does_not_wait_for_a_turn(engine: TimedEngine) -> None:
    engine.writes()
    for name in ("first", "second"):
        engine.add(name, LONG, 2, limit_s=LIMIT_S)
    engine.add("short", 20, 2)
    engine.add("moved", 30, 2, given=(7, 8))
    assert engine.step() == {"answer-0": 1, "first": 64, "short": 20, "moved": 32}


def test_prompts_that_wait_for_their_turn_are_answered_exactly(engine: TimedEngine) -> None:
    engine.writes()
    engine.add("first", 100, 2, limit_s=LIMIT_S)
    engine.add("second", 100, 2, given=(7, 8), limit_s=LIMIT_S)
    engine.pieces("second")
    engine.step()
    assert engine.tokens["first"] == [token_at(100), token_at(101)]
    assert engine.tokens["second"] == [token_at(102), token_at(103)]


def test_a_grammar_that_is_ready_is_only_taken_when_it_is_a_prompts_turn(
    engine: TimedEngine,
) -> None:
    """What the request brings is fed to the grammar once, when it is taken."""
    engine.writes()
    engine.add("first", LONG, 2, limit_s=LIMIT_S)
    second = engine.add("second", 100, 2, limit_s=LIMIT_S)
    second.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    second.structured_output_request = SimpleNamespace(grammar=object())
    assert "second" not in engine.step()
    assert second.status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    assert "second" in engine.step()


def test_prompts_that_are_gone_leave_no_limit(engine: TimedEngine) -> None:
    engine.writes()
    engine.add("gone", LONG, 2, limit_s=LIMIT_S)
    engine.step()
    engine.scheduler.finish_requests(["gone"], RequestStatus.FINISHED_ABORTED)
    engine.add("long", LONG, 2)
    assert engine.step()["long"] == BUDGET - 1


@pytest.mark.parametrize(
    ("engine", "first_pieces"),
    [
        pytest.param({"long_prefill_token_threshold": 100}, [64, 100, 100], id="operators"),
        pytest.param(
            {"long_prefill_token_threshold": 100, "long_prefill_token_threshold_adaptive": True},
            [64, 100, 100],
            id="operators-that-adapts",
        ),
        pytest.param({"scheduling_policy": "priority"}, [64, 128, 256], id="lanes"),
    ],
    indirect=["engine"],
)
def test_of_all_limits_the_least_counts(engine: TimedEngine, first_pieces: list[int]) -> None:
    engine.writes()
    engine.add("long", LONG, 2, limit_s=LIMIT_S)
    assert [engine.step()["long"] for _ in first_pieces] == first_pieces


@pytest.mark.parametrize(
    "engine", [{"long_prefill_token_threshold": 100}], indirect=True, ids=["operators"]
)
def test_the_operators_limit_holds_without_others(engine: TimedEngine) -> None:
    engine.writes()
    engine.add("long", LONG, 2)
    assert engine.step()["long"] == 100


@pytest.mark.parametrize(
    "engine", [{"scheduling_policy": "priority"}], indirect=True, ids=["priority"]
)
def test_lanes_keep_room_for_what_is_urgent(engine: TimedEngine) -> None:
    """The pieces have grown past what lanes leave to a prompt that can wait."""
    engine.writes()
    engine.add("long", 4000, 2, limit_s=10.0, priority=10**15)
    while engine.step()["long"] < 1000:
        pass
    engine.add("urgent", 400, 2, priority=10**14)
    assert engine.step() == {"answer-0": 1, "long": BUDGET - 400, "urgent": 399}


@pytest.mark.parametrize("mode", [Mode(is_async=True), CUDA], ids=str)
def test_where_the_next_step_is_scheduled_before_the_last_is_done(engine: TimedEngine) -> None:
    """What is learned comes a step later. A stalled step is still one step's news."""
    engine.add("answer", 10, 500)
    engine.begin()
    for name in ("long", "longer"):
        engine.add(name, 3900, 2, limit_s=LIMIT_S)
    found = []
    while not engine.tokens["long"]:
        step = engine.begin()
        found.append(step.get("long", 0) + step.get("longer", 0))
        if len(found) == 10:
            engine.now_s += 5.0
        engine.end()
    assert found[:3] == [64, 64, 128]
    assert max(found) <= FITS
    assert found[9] == pytest.approx(FITS, rel=0.05)
    assert found[10] == pytest.approx(FITS / 2, rel=0.05)
    assert found[11] == pytest.approx(FITS, rel=0.05)
    engine.end()
    engine.step()
    assert engine.tokens["long"] == engine.tokens["longer"] == [token_at(3900), token_at(3901)]
    written = engine.tokens["answer"]
    assert written == [token_at(10 + index) for index in range(len(written))]
