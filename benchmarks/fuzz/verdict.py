"""What a fuzz run has shown, and whether it held. Owns the definitions. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from benchmarks.chaos_answers import differences
from benchmarks.chaos_client import Outcome
from benchmarks.fuzz.client import End, Reply
from benchmarks.fuzz.good import Alone, limits_s
from benchmarks.fuzz.shots import Shot
from benchmarks.fuzz.watch import Ended, that_count

_FAIR = frozenset({501, 505})
"""A method or a version of HTTP that is not spoken: the client's doing, whatever their number."""
_FAIR_ELSEWHERE = frozenset({503})
"""HAProxy has no router behind the ports of its metrics and statistics."""
_UNANSWERED = frozenset({End.CLOSED, End.CUT, End.REFUSED})


class Symptom(Enum):
    """What must not be. The value says it."""

    ERROR_500 = "a server's error"
    UNANSWERED = "a well-formed request without an answer"
    WRONG = "a good request with a wrong answer, or none"
    SLOW = "a good request slower than ten times its median alone and than the targets allow"
    ENDED = "a process that ended"
    HELD = "something held after all had ended"
    BROKEN = "something that did not work after the run"
    LEFT = "a process left behind"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fired:
    """A shot, whom it met, and the reply."""

    number: int
    shot: Shot
    target: str
    reply: Reply


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A good request and its outcome."""

    number: int
    outcome: Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What an audit found that the one before had not; `suspects` are the numbers between them."""

    lines: tuple[str, ...]
    suspects: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """All that was seen of a run.

    `broken` says what a replica that was replaced after it did not find in order, `left` which
    processes outlived the cluster.
    """

    seed: int
    alone: Mapping[str, Alone]
    fired: tuple[Fired, ...]
    asked: tuple[Asked, ...]
    ended: tuple[Ended, ...]
    held: tuple[Held, ...]
    num_audits: int
    broken: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that must not be. `numbers` are the requests that show it or may have done it: a
    good request comes first, then what was under way beside it."""

    symptom: Symptom
    what: str
    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The findings and the numbers of the last line."""

    findings: tuple[Finding, ...]
    num_requests: int
    num_ended: int
    slowest_good_s: float
    seed: int

    @property
    def holds(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    @property
    def holds_at_any_speed(self) -> bool:
        """Whether nothing was found but slow answers."""
        return all(finding.symptom is Symptom.SLOW for finding in self.findings)

    def count(self, symptom: Symptom) -> int:
        """How many findings there are of a symptom."""
        return sum(finding.symptom is symptom for finding in self.findings)

    def summary(self) -> dict[str, float]:
        """The last line of the output."""
        return {
            "requests": self.num_requests,
            "errors_500": self.count(Symptom.ERROR_500),
            "unanswered": self.count(Symptom.UNANSWERED),
            "held": self.count(Symptom.HELD),
            "wrong": self.count(Symptom.WRONG),
            "slow": self.count(Symptom.SLOW),
            "ended": self.num_ended,
            "broken": self.count(Symptom.BROKEN),
            "left": self.count(Symptom.LEFT),
            "slowest_good_s": round(self.slowest_good_s, 2),
            "seed": self.seed,
        }


def judge(record: Record) -> Verdict:
    """The verdict on a run."""
    findings = (
        *(each for fired in record.fired for each in _of_shot(fired)),
        *_of_good(record),
        *_of_processes(record),
        *(_of_held(held, record) for held in record.held),
    )
    return Verdict(
        findings=findings,
        num_requests=len(record.fired) + len(record.asked),
        num_ended=len(that_count(record.ended)),
        slowest_good_s=max((_took_s(asked.outcome) for asked in record.asked), default=0.0),
        seed=record.seed,
    )


def _of_shot(fired: Fired) -> Iterator[Finding]:
    shot, reply = fired.shot, fired.reply
    name = f"{shot.kind.value}: {shot.name}"
    if shot.port is not None:
        name += f" to {fired.target}"
    fair = _FAIR if shot.port is None else _FAIR | _FAIR_ELSEWHERE
    errors = [status for status in reply.statuses if status >= 500 and status not in fair]
    if reply.error_code is not None and reply.error_code >= 500:
        errors.append(reply.error_code)
    if errors:
        yield Finding(
            symptom=Symptom.ERROR_500,
            what=f"{name}: status {errors[0]}",
            numbers=(fired.number,),
        )
    elif shot.is_request and _lacks_answer(shot, reply):
        yield Finding(
            symptom=Symptom.UNANSWERED, what=f"{name}: {reply.end.value}", numbers=(fired.number,)
        )


def _lacks_answer(shot: Shot, reply: Reply) -> bool:
    return reply.end in _UNANSWERED or (reply.end is End.SILENT and not shot.long)


def _of_good(record: Record) -> Iterator[Finding]:
    limits = limits_s(record.alone)
    for asked in record.asked:
        outcome = asked.outcome
        if lines := faults(outcome, record.alone[outcome.case]):
            yield Finding(
                symptom=Symptom.WRONG,
                what=f"{outcome.case}: {lines[0]}",
                numbers=(asked.number, *_beside(outcome, record)),
            )
        elif _took_s(outcome) > limits[outcome.case]:
            took = f"{_took_s(outcome):.2f} s, limit {limits[outcome.case]:.2f} s"
            yield Finding(
                symptom=Symptom.SLOW,
                what=f"{outcome.case}: {took}",
                numbers=(asked.number, *_beside(outcome, record)),
            )


def faults(outcome: Outcome, alone: Alone) -> list[str]:
    """How a good answer differs from the one alone, or why there is none; empty if it is right."""
    if outcome.answer is None:
        return [outcome.error or "no answer"]
    return differences(alone.answer, outcome.answer)


def _beside(outcome: Outcome, record: Record) -> tuple[int, ...]:
    """The shots under way at the same time, those first that were it for longest."""
    shared_s = {
        fired.number: min(fired.reply.end_s, outcome.end_s)
        - max(fired.reply.start_s, outcome.start_s)
        for fired in record.fired
    }
    numbers = [number for number, each_s in shared_s.items() if each_s > 0]
    return tuple(sorted(numbers, key=lambda number: -shared_s[number]))


def _of_processes(record: Record) -> Iterator[Finding]:
    for ended in that_count(record.ended):
        yield Finding(
            symptom=Symptom.ENDED,
            what=f"{ended.process} (pid {ended.pid})",
            numbers=ended.suspects,
        )
    for symptom, lines in ((Symptom.BROKEN, record.broken), (Symptom.LEFT, record.left)):
        for line in lines:
            yield Finding(symptom=symptom, what=line, numbers=())


def _of_held(held: Held, record: Record) -> Finding:
    """Those first that ended otherwise than with an answer, or with a server's error."""
    odd = {
        fired.number
        for fired in record.fired
        if any(_of_shot(fired)) or fired.reply.end is not End.ANSWERED
    }
    numbers = tuple(sorted(held.suspects, key=lambda number: number not in odd))
    return Finding(symptom=Symptom.HELD, what="; ".join(held.lines), numbers=numbers)


def _took_s(outcome: Outcome) -> float:
    return outcome.end_s - outcome.start_s
