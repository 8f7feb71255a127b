"""The simulated engine against hand-counted iterations, and what it must never break."""

from dataclasses import replace

import pytest

from benchmarks.simulate.model.engine import Engine
from benchmarks.simulate.model.event_queue import EventQueue
from benchmarks.simulate.model.profiles import DecodeRegime, EngineProfile
from benchmarks.simulate.model.requests import Arrival, SimRequest
from benchmarks.simulate.model.shared_cores import Contention, share_cores
from router.costs import DecodeCost, PrefillCost

PROFILE = EngineProfile(
    name="test",
    source="made up",
    gpus=1,
    prefill=PrefillCost(base_s=0.01, per_token_s=1e-4, per_token_squared_s=0.0),
    decode=(
        DecodeRegime(
            from_batch=0,
            cost=DecodeCost(base_s=0.01, per_request_s=0.001, per_context_token_s=1e-5),
        ),
    ),
    kv_capacity_tokens=10_000,
    kv_bytes_per_token=1000,
    max_batched_tokens=1000,
    overhead_s=0.0,
    overhead_per_token_s=0.0,
    prefill_overhead_s=0.0,
    link_bytes_per_s=1e6,
    link_latency_s=0.0,
)


class Listener:
    """Notes who said what, in order."""

    def __init__(self) -> None:
        self.said: list[tuple[str, int]] = []

    def prefilled(self, engine: Engine, request: SimRequest) -> None:
        self.said.append(("prefilled", request.request_id))

    def pulled(self, engine: Engine, request: SimRequest) -> None:
        self.said.append(("pulled", request.request_id))

    def finished(self, engine: Engine, request: SimRequest) -> None:
        self.said.append(("finished", request.request_id))


def made(profile: EngineProfile = PROFILE) -> tuple[EventQueue, Engine, Listener]:
    events, listener = EventQueue(), Listener()
    return events, Engine(events, profile, listener), listener


def request(request_id: int, prompt: int, output: int) -> SimRequest:
    return SimRequest(Arrival(0.0, prompt, output), request_id)


def test_a_lone_request_takes_what_the_costs_say() -> None:
    events, engine, _ = made()
    lone = request(0, prompt=500, output=4)
    engine.submit(lone)
    events.run_until(10.0)
    prefill_s = 0.01 + 500 * 1e-4
    # Three steps, over 501, 502 and 503 tokens.
    steps_s = 3 * (0.01 + 0.001) + (501 + 502 + 503) * 1e-5
    assert lone.first_token_s == pytest.approx(prefill_s)
    assert lone.ended_s == pytest.approx(prefill_s + steps_s)
    assert engine.kv_used == 0


def test_a_long_prompt_is_read_in_chunks() -> None:
    events, engine, _ = made()
    long = request(0, prompt=2500, output=1)
    engine.submit(long)
    events.run_until(10.0)
    assert long.first_token_s == pytest.approx(3 * 0.01 + 2500 * 1e-4)


def test_answers_go_on_beside_chunks_but_stand_still_where_prompts_go_first() -> None:
    def end_s(*, chunks: bool) -> float:
        events, engine, _ = made(replace(PROFILE, chunks_prefill=chunks))
        answer, prompt = request(0, prompt=10, output=50), request(1, prompt=900, output=1)
        engine.submit(answer)
        events.at(0.1, lambda: engine.submit(prompt))
        events.run_until(10.0)
        assert answer.ended_s is not None
        return answer.ended_s

    assert end_s(chunks=True) < end_s(chunks=False)


@pytest.mark.parametrize("max_paddings", [None, 0])
def test_whole_prompts_are_padded_to_the_longest(max_paddings: int | None) -> None:
    events, engine, _ = made(replace(PROFILE, chunks_prefill=False, max_paddings=max_paddings))
    first, second, third = request(0, 100, 1), request(1, 200, 1), request(2, 300, 1)
    for each in (first, second, third):
        engine.submit(each)
    events.run_until(10.0)
    # The first finds an idle engine. Without padding the others share an iteration.
    alone_s = 0.01 + 100 * 1e-4
    together_s = alone_s + 0.01 + 500 * 1e-4
    apart_s = alone_s + 0.01 + 200 * 1e-4
    assert second.first_token_s == pytest.approx(together_s if max_paddings is None else apart_s)


def test_a_request_joins_at_the_next_step_not_at_the_run_s_end() -> None:
    events, engine, _ = made()
    engine.submit(request(0, prompt=10, output=1000))
    late = request(1, prompt=10, output=2)
    events.at(1.0, lambda: engine.submit(late))
    events.run_until(100.0)
    assert late.first_token_s is not None
    assert late.first_token_s < 1.0 + 0.05


def test_steps_in_closed_form_are_the_sum_of_steps() -> None:
    events, engine, _ = made()
    requests = [request(number, prompt=100 + number, output=20 + number) for number in range(5)]
    for each in requests:
        each.num_output_tokens, each.num_computed_tokens = 1, each.arrival.prompt_tokens
        each.first_token_s = 0.0
    for each in requests:
        engine.submit(each)
    events.run_until(100.0)
    assert all(each.ended_s is not None for each in requests)
    contexts, left = [each.arrival.prompt_tokens + 1 for each in requests], [19, 20, 21, 22, 23]
    time_s = 0.0
    # All have joined by the time that their KV has come over the link, one after the other.
    joined_s = [sum(range(100, 101 + number)) * 1e-3 for number in range(5)]
    running: list[int] = []
    while any(left):
        running = [index for index in range(5) if joined_s[index] <= time_s + 1e-9 and left[index]]
        if not running:
            time_s = min(joined_s[index] for index in range(5) if left[index])
            continue
        time_s += 0.01 + 0.001 * len(running) + 1e-5 * sum(contexts[index] for index in running)
        for index in running:
            contexts[index] += 1
            left[index] -= 1
            if not left[index]:
                assert requests[index].ended_s == pytest.approx(time_s)


def test_kv_runs_out_and_the_last_to_join_is_computed_anew() -> None:
    events, engine, listener = made(replace(PROFILE, kv_capacity_tokens=250))
    first, second = request(0, prompt=100, output=100), request(1, prompt=100, output=100)
    engine.submit(first)
    engine.submit(second)
    events.run_until(100.0)
    assert (first.num_preempted, second.num_preempted) == (0, 1)
    assert first.num_output_tokens == second.num_output_tokens == 100
    assert engine.kv_used == 0
    assert [what for what, _ in listener.said].count("finished") == 2


def test_kv_that_is_kept_for_decode_is_free_once_it_was_pulled() -> None:
    events, engine, _ = made()
    handed = request(0, prompt=100, output=10)
    handed.hands_over = True
    engine.submit(handed)
    events.run_until(1.0)
    assert engine.kv_used == 100
    engine.release(handed.num_computed_tokens)
    assert engine.kv_used == 0


def test_an_engine_that_dies_gives_back_its_requests_with_their_tokens() -> None:
    events, engine, listener = made()
    running, waiting = request(0, prompt=100, output=1000), request(1, prompt=99_999, output=5)
    engine.submit(running)
    engine.submit(waiting)
    events.run_until(1.0)
    left = engine.fail()
    assert {each.request_id for each in left} == {0, 1}
    assert 1 < running.num_output_tokens < 1000
    assert running.num_computed_tokens == waiting.num_computed_tokens == 0
    events.run_until(100.0)
    assert ("finished", 0) not in listener.said


def test_progress_is_that_of_the_oldest_prompt_through_all_its_chunks() -> None:
    events, engine, _ = made()
    assert engine.progress_s == 0.0
    for number, work_s in enumerate((0.2, 0.9)):
        each = request(number, prompt=2500, output=1)
        each.work_s = work_s
        engine.submit(each)
    # Three iterations of 0.11 s: 1000, 1000, and 500 with the first 500 of the other.
    seen = []
    for now_s in (0.15, 0.3, 0.4):
        events.run_until(now_s)
        seen.append(engine.progress_s)
    assert seen == pytest.approx([0.15, 0.2, 0.4 - 0.33]), "at most its work"


def test_prompts_wait_in_order_of_their_latest_start() -> None:
    events, engine, listener = made()
    for request_id, latest_start_ms in ((0, 100), (1, 9000), (2, 8000)):
        waiting = request(request_id, 1000, 1)
        waiting.priority = latest_start_ms
        engine.submit(waiting)
    events.run_until(10.0)
    assert [each for _, each in listener.said] == [0, 2, 1]


def test_late_prompts_give_way_and_still_get_their_turn() -> None:
    events, engine, listener = made()
    # Each takes 0.11 s; the first is read while the second's time runs out.
    for request_id, latest_start_ms in ((0, 10), (1, 50), (2, 150), (3, 5000)):
        waiting = request(request_id, 1000, 1)
        waiting.priority = latest_start_ms
        engine.submit(waiting)
    events.run_until(10.0)
    assert [each for _, each in listener.said] == [0, 2, 3, 1]


def test_prompts_hold_no_kv_before_a_step_gets_to_them() -> None:
    events, engine, _ = made()
    for request_id in range(5):
        engine.submit(request(request_id, 1000, 1))
    events.run_until(0.05)
    assert engine.kv_used == 1000
    assert len(engine.waiting) == 4


EVEN = replace(
    PROFILE,
    decode=(
        DecodeRegime(
            from_batch=0,
            cost=DecodeCost(base_s=0.01, per_request_s=0.001, per_context_token_s=0.0),
        ),
    ),
)
"""Steps of 11 ms alone, whatever the context."""


@pytest.mark.parametrize(
    ("slow_s", "first_s", "end_s"),
    [
        pytest.param(0.05, 0.17, 0.39, id="in-the-prompt"),
        pytest.param(0.148, 0.11, 0.286, id="in-the-fourth-step"),
        pytest.param(0.5, 0.11, 0.22, id="after-all"),
    ],
)
def test_what_is_left_takes_longer_once_the_engine_is_slowed_down(
    slow_s: float, first_s: float, end_s: float
) -> None:
    events, engine, _ = made(EVEN)
    one = request(0, 1000, 11)
    engine.submit(one)
    events.at(slow_s, lambda: engine.slow_down(2.0))
    events.run_until(1.0)
    assert one.first_token_s == pytest.approx(first_s)
    assert one.ended_s == pytest.approx(end_s)
    assert not engine.is_busy


def test_engines_on_the_same_cores_slow_each_other_down_while_both_are_busy() -> None:
    events, listener = EventQueue(), Listener()
    prefill, decode = Engine(events, EVEN, listener), Engine(events, EVEN, listener)
    share_cores(prefill, decode, Contention(prefill=2.0, decode=1.5))
    prompt, answer = request(0, 1000, 1), request(1, 200, 1)
    prefill.submit(prompt)
    events.at(0.05, lambda: decode.submit(answer))
    events.run_until(1.0)
    # The answer's 30 ms take 45, in which the prompt gets as far as in 22.5 ms alone.
    assert answer.ended_s == pytest.approx(0.095)
    assert prompt.ended_s == pytest.approx(0.1325)
