"""What a run has shown: pauses, failures, wrong answers, and whether it held."""

import json
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.chaos_answers import Answer, Choice
from benchmarks.chaos_chart import under_way
from benchmarks.chaos_client import Outcome
from benchmarks.chaos_faults import Kind
from benchmarks.chaos_metrics import Scrape
from benchmarks.chaos_pace import Pace, Speed
from benchmarks.chaos_verdict import (
    Injected,
    Pause,
    Poison,
    Record,
    RouterDeath,
    Sample,
    Unread,
    alike,
    first_token_waits,
    judge,
    moves_by_fault,
    recovery_pauses,
)
from kvtransfer.phase import Phase

STEADY = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)


@pytest.mark.parametrize(
    ("arrivals_s", "fault_times_s", "expected"),
    [
        pytest.param(STEADY, {0: 2.5}, [], id="not disturbed"),
        pytest.param((0, 1, 2, 9, 10, 11), {0: 2.5}, [(0, 6.5)], id="moved"),
        pytest.param((0, 1, 2, 9, 10, 11), {0: 1.8}, [(0, 7.2)], id="a chunk was in flight"),
        pytest.param((0, 1, 2, 9, 10, 11), {0: 1.2}, [], id="begins too late to be the fault's"),
        pytest.param((0, 1, 2, 9, 10, 11), {}, [], id="no fault"),
        pytest.param((0, 1, 2, 9, 10, 11), {0: 20.0, 1: -1.0}, [], id="fault at another time"),
        pytest.param((0, 1, 2, 9, 10, 11), {0: 5.0, 1: 2.5}, [(1, 6.5)], id="the earliest"),
        pytest.param((0, 1, 2, 5, 6, 7), {0: 2.5}, [], id="not much longer than the others"),
        pytest.param((0, 20, 21, 28, 29, 30), {0: 21.5}, [(0, 6.5)], id="a slow handover"),
        pytest.param((0, 9, 10, 11), {0: 1.0}, [(0, 8.0)], id="moved in the handover"),
        pytest.param((0, 9), {0: 1.0}, [], id="nothing to compare with"),
        pytest.param(
            (0, 1, 2, 9, 10, 20, 21, 22, 23, 24, 25),
            {4: 3.0, 5: 12.0},
            [(4, 6.0), (5, 8.0)],
            id="moved twice",
        ),
        pytest.param((1.0,), {0: 0.5}, [], id="one chunk"),
        pytest.param((), {0: 0.5}, [], id="nothing came"),
    ],
)
def test_recovery_pauses(
    arrivals_s: tuple[float, ...],
    fault_times_s: dict[int, float],
    expected: list[tuple[int, float]],
) -> None:
    pauses = recovery_pauses(arrivals_s, fault_times_s)

    assert pauses == [Pause(fault=fault, pause_s=pause_s) for fault, pause_s in expected]


CHOICE = Choice(text="a", token_ids=(1,), logprobs=(), finish_reason="length", stop_reason=None)
RIGHT = Answer(choices=(CHOICE,), completion_tokens=1)
WRONG = replace(RIGHT, choices=(replace(CHOICE, token_ids=(2,)),))


def outcome(**fields: Any) -> Outcome:
    defaults: dict[str, Any] = {
        "case": "one",
        "start_s": 0.0,
        "end_s": 10.0,
        "answer": RIGHT,
        "arrivals_s": (STEADY,),
        "error": None,
    }
    return Outcome(**(defaults | fields))


def fault(at_s: float, kind: Kind = Kind.KILL_ENGINE) -> Injected:
    pool: Phase | None = "decode" if kind.hits_pool else None
    return Injected(
        at_s=at_s, kind=kind, pool=pool, target="", num_live={"prefill": 2, "decode": 2}
    )


PACE = Pace(
    duration_s=120.0,
    rate=1.0,
    fault_every_s=12.0,
    timeout_s=100.0,
    unread_s=60.0,
    freed_within_s=2.0,
    held_s=30.0,
    crowd_tokens=100,
)


LEFT = Injected(at_s=1.0, kind=Kind.CLIENTS_LEAVE, pool=None, target="", num_live={})


def record(*outcomes: Outcome, **fields: Any) -> Record:
    defaults: dict[str, Any] = {
        "speed": Speed(start_s=20.0, rate=2.0, token_rate=600.0),
        "pace": PACE,
        "start_s": 0.0,
        "end_s": 10.0,
        "faults": (LEFT,),
        "outcomes": outcomes,
        "expected": {"one": RIGHT},
        "samples": (),
        "whole_after_s": 3.0,
        "held": (),
    }
    return Record(**(defaults | fields))


def router_death(*, num_connections: int = 5, freed_after_s: float | None = 0.3) -> RouterDeath:
    return RouterDeath(at_s=5.0, num_connections=num_connections, freed_after_s=freed_after_s)


def test_first_token_waits() -> None:
    waited = outcome(start_s=1.0, arrivals_s=((4.0, 5.0), (3.0,), ()))

    assert first_token_waits(waited, {7: 2.0}) == [
        Pause(fault=7, pause_s=2.0),
        Pause(fault=7, pause_s=1.0),
    ]
    assert first_token_waits(waited, {7: 0.5}) == []


def test_it_held() -> None:
    verdict = judge(record(outcome()))

    assert verdict.reasons == ()
    assert verdict.summary() == {
        "requests": 1,
        "failed": 0,
        "wrong": 0,
        "ended_with_router": 0,
        "moved": 0,
        "recovery_p50_s": None,
        "recovery_p99_s": None,
        "growth": None,
    }


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        pytest.param(record(), "there was no request", id="no request"),
        pytest.param(record(outcome(), faults=()), "there was no fault", id="no fault"),
        pytest.param(
            record(outcome(answer=None, error="HTTP 500")), "1 requests failed", id="failed"
        ),
        pytest.param(record(outcome(answer=WRONG)), "1 answers are wrong", id="wrong"),
        pytest.param(
            record(outcome(), whole_after_s=None),
            "the pools did not become whole again",
            id="not whole",
        ),
        pytest.param(
            record(outcome(), held=("pdserve_inflight: 1",)),
            "held at the end: pdserve_inflight: 1",
            id="held",
        ),
        pytest.param(
            record(outcome(), left=("12: engine",)), "left at the end: 12: engine", id="left"
        ),
        pytest.param(
            record(outcome(), router_deaths=(router_death(freed_after_s=None),)),
            "an engine went on working for a dead router",
            id="never freed",
        ),
        pytest.param(
            record(outcome(), router_deaths=(router_death(freed_after_s=2.5),)),
            "an engine went on working for a dead router",
            id="freed late",
        ),
        pytest.param(
            record(outcome(), unread=(Unread(grown_bytes=2**30, num_others=9),)),
            "a client that did not read cost too much memory",
            id="unread answers pile up",
        ),
        pytest.param(
            record(outcome(), unread=(Unread(grown_bytes=0, num_others=0),)),
            "a client that did not read blocked the others",
            id="blocked",
        ),
        pytest.param(
            record(outcome(), poison=Poison(num_killed=4, error="refused")),
            "a request that kills engines was not refused in time",
            id="poison kills a fourth",
        ),
        pytest.param(
            record(outcome(), poison=Poison(num_killed=3, error=None)),
            "a request that kills engines was not refused in time",
            id="poison is answered",
        ),
    ],
)
def test_it_did_not_hold(run: Record, reason: str) -> None:
    assert judge(run).reasons == (reason,)


def test_failures_of_a_kind_are_counted_together() -> None:
    errors = ["replica 0a1b2c3d4e is gone", "replica 99887766ff is gone", "HTTP 503: busy"]
    verdict = judge(record(*(outcome(answer=None, error=error) for error in errors)))

    assert verdict.num_failed == 3
    assert verdict.failures == {"replica … is gone": 2, "HTTP 503: busy": 1}
    assert alike("no end within 120 s") == "no end within 120 s"


def broken(start_s: float, end_s: float, *, is_broken: bool = True) -> Outcome:
    return outcome(
        start_s=start_s, end_s=end_s, answer=None, error="the stream was cut off", broken=is_broken
    )


@pytest.mark.parametrize(
    ("ended", "num_excused"),
    [
        pytest.param([broken(1.0, 5.1)], 1, id="broken by the death"),
        pytest.param([broken(1.0, 4.9)], 0, id="before it"),
        pytest.param([broken(1.0, 7.5)], 0, id="too late"),
        pytest.param(
            [replace(broken(1.0, 65.0), read_at_once=False)], 1, id="seen late, for want of reading"
        ),
        pytest.param([broken(1.0, 5.1, is_broken=False)], 0, id="an error that came in words"),
        pytest.param([broken(1.0, 5.1), broken(2.0, 5.1)], 2, id="two"),
        pytest.param([broken(at_s, 5.1) for at_s in range(5)], 3, id="more than the router had"),
    ],
)
def test_what_ends_with_its_router(ended: list[Outcome], num_excused: int) -> None:
    verdict = judge(record(*ended, router_deaths=(router_death(num_connections=3),)))

    assert verdict.num_ended_with_router == num_excused
    assert verdict.num_failed == len(ended) - num_excused


def test_what_holds_with_every_kind_of_fault() -> None:
    verdict = judge(
        record(
            outcome(),
            router_deaths=(router_death(),),
            unread=(Unread(grown_bytes=10 * 2**20, num_others=40),),
            poison=Poison(num_killed=3, error="error in the stream: refused"),
        )
    )

    assert verdict.reasons == ()


def test_clients_that_left_neither_failed_nor_are_wrong() -> None:
    verdict = judge(record(outcome(answer=None, left=True), outcome()))

    assert (verdict.num_requests, verdict.num_left, verdict.reasons) == (2, 1, ())


def test_moves_and_pauses() -> None:
    moved = outcome(arrivals_s=((0, 1, 2, 9, 10, 11), (0, 1, 2, 4, 5, 6, 7, 8)))
    faults = (fault(2.5, Kind.CLIENTS_LEAVE), fault(3.0))

    verdict = judge(record(moved, faults=faults))

    assert verdict.pauses == (Pause(fault=1, pause_s=6.0),)
    assert verdict.num_moved == 1
    assert verdict.recovery_s(0.5) == 6.0
    assert json.loads(json.dumps(verdict.summary()))["recovery_p99_s"] == 6.0


def sample(at_s: float, num_moves: int | None) -> Sample:
    seen = Scrape(num_live={"prefill": 2, "decode": 2}, held=(), moves={}, num_moves=num_moves)
    return Sample(at_s=at_s, seen=seen)


def test_a_client_that_does_not_read_sees_no_pause() -> None:
    slow = outcome(arrivals_s=((0, 1, 2, 9, 10, 11),), read_at_once=False)

    assert judge(record(slow, faults=(fault(3.0),))).pauses == ()


def test_the_routers_count_of_moves_goes_first() -> None:
    samples = (sample(1.0, 0), sample(2.0, 5))

    assert judge(record(outcome(), samples=samples)).num_moved == 5


@pytest.mark.parametrize(
    ("num_moves", "pauses_s"),
    [
        pytest.param((0, 0), [], id="no move: it only stood still"),
        pytest.param((0, 1), [6.0], id="one of the two, the longer"),
        pytest.param((0, 5), [6.0, 5.0], id="both"),
        pytest.param((5, 5), [], id="moves before the fault"),
        pytest.param((None, None), [5.0, 6.0], id="the router does not count"),
    ],
)
def test_pauses_that_the_router_bears_out(
    num_moves: tuple[int | None, int | None], pauses_s: list[float]
) -> None:
    run = record(
        outcome(arrivals_s=((0, 1, 2, 8, 9, 10), (0, 1, 2, 9, 10, 11))),
        faults=(fault(3.0),),
        samples=(sample(2.5, num_moves[0]), sample(9.5, num_moves[1])),
    )

    assert [pause.pause_s for pause in judge(run).pauses] == pauses_s


def test_moves_by_fault() -> None:
    faults = (fault(2.5), fault(3.5, Kind.SLOW_READER), fault(6.5))
    counts = (0, 0, 0, 3, 3, 4, 4, 9)
    run = record(faults=faults, samples=tuple(map(sample, range(8), counts)))

    assert moves_by_fault(run) == {0: 4, 2: 5}
    assert moves_by_fault(record(faults=faults, samples=(sample(9.0, None),))) == {}
    assert moves_by_fault(record(faults=(), samples=(sample(9.0, 3),))) == {}


def test_under_way() -> None:
    outcomes = [outcome(start_s=0.0, end_s=4.0), outcome(start_s=1.0, end_s=2.0)]

    assert under_way(outcomes) == ([0.0, 1.0, 2.0, 4.0], [1, 2, 1, 0])
