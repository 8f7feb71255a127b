"""What a run has shown, from its record."""

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.chaos_answers import Answer
from benchmarks.chaos_client import Outcome
from benchmarks.fuzz.client import End, Reply
from benchmarks.fuzz.good import Alone, limits_s
from benchmarks.fuzz.shots import Kind, Shot
from benchmarks.fuzz.verdict import Asked, Fired, Held, Record, Symptom, judge
from benchmarks.fuzz.watch import Ended

RIGHT = Answer(choices=(), completion_tokens=1)
WRONG = Answer(choices=(), completion_tokens=2)
ALONE = {"greedy": Alone(answer=RIGHT, took_s=(0.1, 0.1, 0.3))}
CLEAN = Record(seed=3, alone=ALONE, fired=(), asked=(), ended=(), held=(), num_audits=1)


def fired(
    *statuses: int,
    number: int = 0,
    end: End = End.ANSWERED,
    code: int | None = None,
    **of_shot: Any,
) -> Fired:
    of_shot = {"is_request": True, **of_shot}
    return Fired(
        number=number,
        target="the front door",
        shot=Shot(kind=Kind.EDGE, name="n is 2", parts=(), **of_shot),
        reply=Reply(end=end, start_s=0.0, end_s=2.0, statuses=statuses, error_code=code),
    )


def asked(took_s: float = 0.2, answer: Answer | None = RIGHT, *, number: int = 1) -> Asked:
    return Asked(
        number=number,
        outcome=Outcome(
            case="greedy",
            start_s=1.0,
            end_s=1.0 + took_s,
            answer=answer,
            arrivals_s=(),
            error=None if answer else "HTTP 503: no",
        ),
    )


def ended(process: str) -> Ended:
    return Ended(process=process, pid=1, at_s=0.0, suspects=(4, 5))


@pytest.mark.parametrize(
    ("shot", "symptoms"),
    [
        pytest.param(fired(200), [], id="answered"),
        pytest.param(fired(400), [], id="refused"),
        pytest.param(fired(501), [], id="a method that is not spoken"),
        pytest.param(fired(500), [Symptom.ERROR_500], id="a server's error"),
        pytest.param(fired(200, 503), [Symptom.ERROR_500], id="in a pipeline"),
        pytest.param(fired(503), [Symptom.ERROR_500], id="no router"),
        pytest.param(fired(503, port=0.5, is_request=False), [], id="no router behind other ports"),
        pytest.param(fired(500, port=0.5), [Symptom.ERROR_500], id="an error there"),
        pytest.param(fired(500, is_request=False), [Symptom.ERROR_500], id="for what is none"),
        pytest.param(fired(200, code=500), [Symptom.ERROR_500], id="in a stream"),
        pytest.param(fired(200, code=400), [], id="a refusal in a stream"),
        pytest.param(fired(end=End.CLOSED), [Symptom.UNANSWERED], id="closed"),
        pytest.param(fired(200, end=End.CUT), [Symptom.UNANSWERED], id="cut"),
        pytest.param(fired(end=End.REFUSED), [Symptom.UNANSWERED], id="no connection"),
        pytest.param(fired(end=End.CLOSED, is_request=False), [], id="closed on what is none"),
        pytest.param(fired(end=End.SILENT), [Symptom.UNANSWERED], id="silent"),
        pytest.param(fired(end=End.SILENT, long=True), [], id="silent, and long"),
        pytest.param(fired(end=End.LEFT), [], id="left"),
    ],
)
def test_shots(shot: Fired, symptoms: list[Symptom]) -> None:
    verdict = judge(replace(CLEAN, fired=(shot,)))
    assert [finding.symptom for finding in verdict.findings] == symptoms
    assert verdict.holds == (not symptoms)


@pytest.mark.parametrize(
    ("good", "symptoms"),
    [
        pytest.param(asked(), [], id="right"),
        pytest.param(asked(1.0), [], id="at the limit"),
        pytest.param(asked(1.1), [Symptom.SLOW], id="slow"),
        pytest.param(asked(answer=WRONG), [Symptom.WRONG], id="wrong"),
        pytest.param(asked(9.0, answer=None), [Symptom.WRONG], id="no answer"),
    ],
)
def test_good_requests(good: Asked, symptoms: list[Symptom]) -> None:
    verdict = judge(replace(CLEAN, asked=(good,)))
    assert [finding.symptom for finding in verdict.findings] == symptoms


def test_what_ran_beside_a_slow_request_is_named() -> None:
    beside = (
        fired(200, number=7),
        replace(
            fired(200, number=8), reply=Reply(end=End.ANSWERED, start_s=0, end_s=9, statuses=(200,))
        ),
        replace(
            fired(200, number=9),
            reply=Reply(end=End.ANSWERED, start_s=0, end_s=0.5, statuses=(200,)),
        ),
    )
    (finding,) = judge(replace(CLEAN, fired=beside, asked=(asked(5.0),))).findings
    assert finding.numbers == (1, 8, 7)


@pytest.mark.parametrize(
    ("processes", "num"),
    [
        pytest.param((), 0, id="none"),
        pytest.param(("decode", "VLLM::EngineCore"), 2, id="an engine and its replica"),
        pytest.param(("HAProxy",), 1, id="the proxy alone"),
        pytest.param(("router", "HAProxy"), 1, id="the proxy after a router"),
    ],
)
def test_processes(processes: tuple[str, ...], num: int) -> None:
    verdict = judge(replace(CLEAN, ended=tuple(map(ended, processes))))
    assert (verdict.num_ended, verdict.count(Symptom.ENDED)) == (num, num)


def test_held_and_left() -> None:
    record = replace(CLEAN, held=(Held(lines=("x: 1",), suspects=(1, 2)),), left=("9: x",))
    verdict = judge(replace(record, broken=("a", "b")))
    counts = [verdict.count(each) for each in (Symptom.HELD, Symptom.LEFT, Symptom.BROKEN)]
    assert counts == [1, 1, 2]
    assert not verdict.holds


def test_who_may_have_left_what_is_held() -> None:
    shots = (
        fired(200, number=1),
        fired(end=End.LEFT, number=2),
        fired(400, number=3),
        fired(500, number=4),
    )
    record = replace(CLEAN, fired=shots, held=(Held(lines=("x",), suspects=(1, 2, 3, 4)),))
    numbers = {finding.symptom: finding.numbers for finding in judge(record).findings}
    assert numbers[Symptom.HELD] == (2, 4, 1, 3)


def test_summary() -> None:
    record = replace(CLEAN, fired=(fired(500), fired(200)), asked=(asked(), asked(0.456)))
    assert judge(record).summary() == {
        "requests": 4,
        "errors_500": 1,
        "unanswered": 0,
        "held": 0,
        "wrong": 0,
        "slow": 0,
        "ended": 0,
        "broken": 0,
        "left": 0,
        "slowest_good_s": 0.46,
        "seed": 3,
    }


def test_a_short_case_is_judged_by_the_typical_one() -> None:
    alone = {
        name: Alone(answer=RIGHT, took_s=(took_s,))
        for name, took_s in (("short", 0.01), ("middle", 0.2), ("long", 1.0))
    }
    assert limits_s(alone) == {"short": 2.0, "middle": 2.0, "long": 10.0}


def test_a_case_may_take_what_the_targets_allow() -> None:
    alone = {"a": Alone(answer=RIGHT, took_s=(0.1,), promised_s=2.5)}
    assert limits_s(alone) == {"a": 2.5}
