"""What a live autoscaling run saw, and whether it is what was to be seen. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.chaos_client import Outcome
from kvtransfer.phase import PHASES, Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Of one replica of each pool that has nothing else to do."""

    prompt_s: float
    """Until the first token of a long prompt."""
    token_s: float
    """From token to token, of as many answers as a decode replica writes at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPhase:
    """One kind of load: `rate` requests a second for `least_s` seconds.

    With `until_small` it goes on, `most_s` at most, until each pool has one replica.
    """

    name: str
    prompt_tokens: int
    output_tokens: int
    rate: float
    least_s: float
    most_s: float
    until_small: bool = False
    grows: Phase | None = None
    """The pool that has to grow."""

    def describe(self) -> str:
        """The load, in words."""
        return (
            f"{self.rate:.3g} requests/s of {self.prompt_tokens} tokens,"
            f" answers of {self.output_tokens}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPhaseRecord:
    phase: LoadPhase
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """How many replicas each pool had, as the router saw them. Times are `time.monotonic`'s."""

    at_s: float
    num_live: Mapping[Phase, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """All that a run saw; `outcomes` carry the name of their phase."""

    start_s: float
    speed: Speed
    phases: tuple[LoadPhaseRecord, ...]
    outcomes: tuple[Outcome, ...]
    samples: tuple[Sample, ...]

    def during(self, record: LoadPhaseRecord) -> tuple[Sample, ...]:
        """The samples of a phase."""
        return tuple(each for each in self.samples if record.start_s <= each.at_s <= record.end_s)

    def of(self, phase: LoadPhase) -> tuple[Outcome, ...]:
        """The requests of a phase."""
        return tuple(each for each in self.outcomes if each.case == phase.name)


def judge(record: Record) -> tuple[str, ...]:
    """What did not go as it should, one line each; nothing if all did."""
    reasons = [
        f"{outcome.case}: a request failed: {outcome.error}"
        for outcome in record.outcomes
        if outcome.error is not None
    ]
    for each in record.phases:
        samples, phase = record.during(each), each.phase
        for pool in PHASES:
            most = max((sample.num_live[pool] for sample in samples), default=0)
            if pool == phase.grows and most != 2:
                reasons.append(f"{phase.name}: {pool} did not go to two, but to {most}")
            if phase.grows is not None and pool != phase.grows and most > 1:
                reasons.append(f"{phase.name}: {pool} went to {most}")
            if phase.until_small and (not samples or samples[-1].num_live[pool] != 1):
                reasons.append(f"{phase.name}: {pool} did not go back to one")
    return tuple(reasons)
