"""What a chaos run has shown: failures, wrong answers, recovery pauses, and whether it held.

Owns the definitions. Pure: it starts from the record of a run.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from benchmarks.chaos_answers import Answer, differences
from benchmarks.chaos_client import Outcome
from benchmarks.chaos_failover import Failover
from benchmarks.chaos_faults import Kind
from benchmarks.chaos_memory import Growth
from benchmarks.chaos_metrics import Scrape
from benchmarks.chaos_pace import Pace, Speed
from benchmarks.load import percentile
from kvtransfer.phase import Phase

ROUTER_WINDOW_S = 2.0
"""A broken connection this soon after a router's death is that router's, at most."""
MAX_UNREAD_BYTES = 64 * 2**20
"""What one client that does not read may cost a router."""
NUM_POISONED = 3
"""After so many failures of engines a request is refused that makes each one fail."""

MIN_PAUSE_RATIO = 5.0
"""How many times longer than a stream's median gap one must be to count as a fault's."""
IN_FLIGHT_S = 0.25
"""What an engine made before its end may reach the client so much later."""

PAUSE_DEFINITION = f"""\
A stream is one choice of a streamed request. Clients are not told of a move, so a stream counts as
seen to move by a fault that costs a replica if it had a token by then and, of its gaps between
chunks that end after the fault and begin at most {IN_FLIGHT_S:g} s after it (what was in flight
still arrives), the longest is at least {MIN_PAUSE_RATIO:g} times the stream's median gap. Where the
router counts moves, no more streams than it counted from the fault to the last of these chunks are
taken, the longest pauses first. The recovery pause runs from the fault, the earliest if several
share a gap, to the chunk that ends the gap, on the client's clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Injected:
    """A fault that was injected at `at_s` on the clock of the outcomes; `target` is for people."""

    at_s: float
    kind: Kind
    pool: Phase | None
    target: str
    num_live: Mapping[Phase, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterDeath:
    """A router was killed that had `num_connections` to clients, by way of the proxy, which keeps
    some open that have no request. `freed_after_s` is when engines had no more requests than the
    other routers had sent, or None if never."""

    at_s: float
    num_connections: int
    freed_after_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Unread:
    """A client read nothing for a while: by how much a router's memory grew, at most, and how many
    other requests were answered in the meantime."""

    grown_bytes: int
    num_others: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Poison:
    """A request whose every engine was killed: how many were, and what its client was told."""

    num_killed: int
    error: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A look at the router's metrics during the run."""

    at_s: float
    seen: Scrape


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """All that was seen of a run. `whole_after_s` is from the last answer to full pools, or None
    if they never were; `held` and `left` are lines about what should not be there."""

    speed: Speed
    pace: Pace
    start_s: float
    end_s: float
    faults: tuple[Injected, ...]
    outcomes: tuple[Outcome, ...]
    expected: Mapping[str, Answer]
    samples: tuple[Sample, ...]
    whole_after_s: float | None
    held: tuple[str, ...]
    left: tuple[str, ...] = ()
    router_deaths: tuple[RouterDeath, ...] = ()
    unread: tuple[Unread, ...] = ()
    poison: Poison | None = None
    failovers: tuple[Failover, ...] = ()
    growths: tuple[Growth, ...] = ()
    """Of the memory of processes, those that grew most first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """One stream's recovery from a fault of the record, by its index."""

    fault: int
    pause_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The run in numbers, and why it did not hold, if so."""

    num_requests: int
    num_left: int
    num_ended_with_router: int
    failures: Mapping[str, int]
    wrong: tuple[str, ...]
    pauses: tuple[Pause, ...]
    first_token_waits: tuple[Pause, ...]
    num_moved: int
    reasons: tuple[str, ...]
    growth: float | None = None
    """Of the memory of the process that grew most after the warm-up, as a fraction."""

    @property
    def num_failed(self) -> int:
        """Requests without a whole answer whose client had not left."""
        return sum(self.failures.values())

    def recovery_s(self, fraction: float) -> float | None:
        """A percentile of the pauses; None if no stream was seen to move."""
        pauses_s = [pause.pause_s for pause in self.pauses]
        return percentile(pauses_s, fraction) if pauses_s else None

    def summary(self) -> dict[str, int | float | None]:
        """What the last line of the output says."""
        p50_s, p99_s = self.recovery_s(0.5), self.recovery_s(0.99)
        return {
            "requests": self.num_requests,
            "failed": self.num_failed,
            "wrong": len(self.wrong),
            "ended_with_router": self.num_ended_with_router,
            "moved": self.num_moved,
            "recovery_p50_s": None if p50_s is None else round(p50_s, 3),
            "recovery_p99_s": None if p99_s is None else round(p99_s, 3),
            "growth": None if self.growth is None else round(self.growth, 4),
        }


def judge(record: Record) -> Verdict:
    """The verdict on a run. Moves are the router's count, or the client's where it has none."""
    with_router = [ended_with_router(record.outcomes, death) for death in record.router_deaths]
    excused = {id(outcome) for outcomes in with_router for outcome in outcomes}
    failures = Counter(
        alike(outcome.error)
        for outcome in record.outcomes
        if outcome.error is not None and id(outcome) not in excused
    )
    wrong = tuple(
        f"{outcome.case}: {'; '.join(lines)}"
        for outcome in record.outcomes
        if outcome.answer is not None
        and (lines := differences(record.expected[outcome.case], outcome.answer))
    )
    times_s = _times_s(record.faults)
    timed = [outcome for outcome in record.outcomes if outcome.read_at_once]
    streams = [arrivals_s for outcome in timed for arrivals_s in outcome.arrivals_s]
    seen = [pause for stream in streams for pause in recovery_pauses(stream, times_s)]
    pauses = _as_counted(seen, record)
    num_moves = record.samples[-1].seen.num_moves if record.samples else None
    return Verdict(
        num_requests=len(record.outcomes),
        num_left=sum(outcome.left for outcome in record.outcomes),
        num_ended_with_router=len(excused),
        failures=dict(failures.most_common()),
        wrong=wrong,
        pauses=pauses,
        first_token_waits=tuple(
            wait for outcome in timed for wait in first_token_waits(outcome, times_s)
        ),
        num_moved=len(pauses) if num_moves is None else num_moves,
        reasons=_reasons(record, num_failed=failures.total(), num_wrong=len(wrong)),
        growth=max((each.fraction for each in record.growths), default=None),
    )


def ended_with_router(outcomes: Sequence[Outcome], death: RouterDeath) -> list[Outcome]:
    """The requests that were under way when a router died and whose connection broke then.

    No more than it had are its own; any others count as failed.
    """
    until_s = death.at_s + ROUTER_WINDOW_S
    broken = [
        outcome
        for outcome in outcomes
        if outcome.broken
        and outcome.start_s <= until_s
        and death.at_s <= outcome.end_s
        # Who does not read learns of it late.
        and (outcome.end_s <= until_s or not outcome.read_at_once)
    ]
    return broken[: death.num_connections]


def recovery_pauses(arrivals_s: Sequence[float], fault_times_s: Mapping[int, float]) -> list[Pause]:
    """The pauses of one stream, as its client sees them; fault times by the fault's index."""
    gaps = list(pairwise(arrivals_s))
    if len(gaps) < 2:
        return []  # nothing to compare with
    least_s = MIN_PAUSE_RATIO * median(until_s - after_s for after_s, until_s in gaps)
    pauses = []
    taken = set()
    for fault, at_s in sorted(fault_times_s.items(), key=lambda each: each[1]):
        if at_s < arrivals_s[0]:
            continue
        near = [gap for gap in gaps if gap[1] > at_s and gap[0] <= at_s + IN_FLIGHT_S]
        longest = max(near, key=lambda gap: gap[1] - gap[0], default=None)
        if longest is None or longest in taken or longest[1] - longest[0] < least_s:
            continue
        taken.add(longest)
        pauses.append(Pause(fault=fault, pause_s=longest[1] - at_s))
    return pauses


def _as_counted(pauses: Sequence[Pause], record: Record) -> tuple[Pause, ...]:
    """Those pauses that the router's count of moves bears out, by `PAUSE_DEFINITION`."""
    counts = _move_counts(record)
    if not counts:
        return tuple(pauses)
    kept: list[Pause] = []
    for fault in sorted({pause.fault for pause in pauses}):
        own = sorted((pause for pause in pauses if pause.fault == fault), key=_pause_s)[::-1]
        at_s = record.faults[fault].at_s
        until_s = at_s + own[0].pause_s
        before = max((number for seen_s, number in counts if seen_s <= at_s), default=0)
        after = next((number for seen_s, number in counts if seen_s >= until_s), counts[-1][1])
        kept += own[: after - before]
    return tuple(kept)


def first_token_waits(outcome: Outcome, fault_times_s: Mapping[int, float]) -> list[Pause]:
    """From a fault to the first token of each choice that waited for it when the fault came.

    That replica need not have been the one that was hit: seen from outside, all are alike.
    """
    firsts_s = [arrivals_s[0] for arrivals_s in outcome.arrivals_s if arrivals_s]
    return [
        Pause(fault=fault, pause_s=first_s - fault_times_s[fault])
        for first_s in firsts_s
        if (fault := _earliest(fault_times_s, outcome.start_s, first_s)) is not None
    ]


def moves_by_fault(record: Record) -> dict[int, int]:
    """How many moves the router counted from each fault that costs a replica to the next.

    Empty where it counts none, or no fault costs one. An engine that hangs is moved from only when
    that is noticed.
    """
    times_s = _times_s(record.faults)
    counts = _move_counts(record)
    if not counts:
        return {}

    def until(at_s: float) -> int:
        return max((number for seen_s, number in counts if seen_s <= at_s), default=0)

    ends_s = [*times_s.values(), math.inf][1:]
    return {
        fault: until(end_s) - until(at_s)
        for (fault, at_s), end_s in zip(times_s.items(), ends_s, strict=True)
    }


def alike(error: str) -> str:
    """An error's text without what makes each of its kind unique: ids, ports, times."""
    return re.sub(r"[0-9a-f]{8,}(-[0-9a-f]{4,})*|\d{4,}|\d+\.\d+", "…", error)


def _move_counts(record: Record) -> list[tuple[float, int]]:
    return [
        (sample.at_s, sample.seen.num_moves)
        for sample in record.samples
        if sample.seen.num_moves is not None
    ]


def _pause_s(pause: Pause) -> float:
    return pause.pause_s


def _times_s(faults: Sequence[Injected]) -> dict[int, float]:
    return {index: fault.at_s for index, fault in enumerate(faults) if fault.kind.hits_pool}


def _earliest(times_s: Mapping[int, float], after_s: float, until_s: float) -> int | None:
    inside = [index for index, at_s in times_s.items() if after_s < at_s < until_s]
    return min(inside, key=times_s.__getitem__, default=None)


def _reasons(record: Record, *, num_failed: int, num_wrong: int) -> tuple[str, ...]:
    found = {
        "there was no request": not record.outcomes,
        "there was no fault": not record.faults,
        f"{num_failed} requests failed": num_failed,
        f"{num_wrong} answers are wrong": num_wrong,
        "the pools did not become whole again": record.whole_after_s is None,
        "an engine went on working for a dead router": any(
            death.freed_after_s is None or death.freed_after_s > record.pace.freed_within_s
            for death in record.router_deaths
        ),
        "a client that did not read cost too much memory": any(
            unread.grown_bytes > MAX_UNREAD_BYTES for unread in record.unread
        ),
        "a client that did not read blocked the others": any(
            unread.num_others == 0 for unread in record.unread
        ),
        "a request that kills engines was not refused in time": record.poison is not None
        and (record.poison.num_killed != NUM_POISONED or record.poison.error is None),
        "requests failed when an engine ended under them": any(
            failover.num_failed for failover in record.failovers
        ),
        f"held at the end: {'; '.join(record.held)}": record.held,
        f"left at the end: {'; '.join(record.left)}": record.left,
    }
    return tuple(reason for reason, applies in found.items() if applies)
