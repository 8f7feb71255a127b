"""KV runs out under priorities: vLLM's own scheduler with our lanes, and a model that counts."""

import time
from collections.abc import Iterator

import pytest
from counting_engine import BLOCK_SIZE, MODES, CountingEngine, Mode, token_at
from vllm.v1.request import Request

NUM_BLOCKS = 5
"""One of them is vLLM's own: two prompts of two blocks fit, and not a token more."""
PROMPT_TOKENS = 2 * BLOCK_SIZE - 2
NUM_MORE = 8


class Engine(CountingEngine):
    """Too small for what it is asked."""

    def __init__(self, mode: Mode) -> None:
        super().__init__(num_blocks=NUM_BLOCKS, mode=mode, scheduling_policy="priority")

    def ask(
        self,
        request_id: str,
        priority: int,
        *,
        given: tuple[int, ...] = (),
        arrival_s: float | None = None,
    ) -> Request:
        return self.add(
            request_id,
            PROMPT_TOKENS,
            NUM_MORE,
            given=given,
            priority=priority,
            arrival_time=float(len(self.tokens)) if arrival_s is None else arrival_s,
        )


@pytest.fixture(params=MODES)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = Engine(request.param)
    yield engine
    engine.check_settled()
    engine.scheduler.shutdown()


def expected(num_given: int = 0) -> list[int]:
    start = PROMPT_TOKENS + num_given
    return [token_at(position) for position in range(start, start + NUM_MORE)]


@pytest.mark.parametrize("order", [("urgent", "patient"), ("patient", "urgent")])
def test_the_least_urgent_gives_up_its_kv_whoever_came_first(
    engine: Engine, order: tuple[str, str]
) -> None:
    priorities = {"urgent": 1, "patient": 9}
    requests = {name: engine.ask(name, priorities[name]) for name in order}
    engine.run()
    assert engine.ended == ["urgent", "patient"]
    assert requests["urgent"].num_preemptions == 0
    assert requests["patient"].num_preemptions > 0
    assert engine.tokens == {"urgent": expected(), "patient": expected()}


def test_one_that_came_with_tokens_goes_on_exactly_after_it_was_preempted(
    engine: Engine,
) -> None:
    given = (token_at(PROMPT_TOKENS), token_at(PROMPT_TOKENS + 1))
    moved = engine.ask("moved", 9, given=given)
    engine.ask("urgent", 1)
    engine.run()
    assert moved.num_preemptions > 0
    assert engine.tokens["moved"] == expected(num_given=len(given))


@pytest.mark.parametrize(("waited_s", "first"), [(0.5, "late"), (5.0, "fresh")])
def test_a_prompt_that_is_late_gives_way_to_one_that_is_not(
    engine: Engine, waited_s: float, first: str
) -> None:
    now_s = time.time()
    arrival_s = now_s - waited_s
    engine.ask("late", round(1000 * (arrival_s + 3.0)), arrival_s=arrival_s)
    engine.ask("fresh", round(1000 * (now_s + 30.0)), arrival_s=now_s)
    engine.run()
    assert engine.ended[0] == first
