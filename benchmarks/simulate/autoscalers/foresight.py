"""What can be had without knowing the future: the oracle's schedule, asked for when it is due.

Owns the autoscaler that does so. Knows no policy's rules and no trace.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.simulate.autoscalers.oracle import SHARE, SLOT_S, Schedule
from benchmarks.simulate.model.fleet import FleetSpec
from benchmarks.simulate.model.history import Observation
from benchmarks.simulate.model.requests import Arrival
from benchmarks.simulate.model.scaled_run import FleetSize, run_scaled
from router.slo import Slo

RESERVES = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0)
"""On top of what is needed, as parts of it."""
FLOORS = (0.0, 0.25, 0.5, 0.75)
"""Kept all the time, as parts of the most that is ever needed."""


class WithoutForesight:
    """Knows at every moment what the oracle needs just then, exactly and at once, and nothing of
    what comes.

    It keeps a reserve of so many times that and never less than a floor, and lets a replica go once
    it has not been needed for as long as a start takes: an idle replica has then cost what a start
    costs, so no rule that does not know the future is sure to lose less (ski rental).
    """

    period_s = SLOT_S

    def __init__(
        self, schedule: Schedule, spec: FleetSpec, *, reserve: float, floor: float = 0.0
    ) -> None:
        assert spec.decode is not None
        self._prefill = _held(schedule.prefill, spec.prefill.start_s, reserve, floor)
        self._decode = _held(schedule.decode, spec.decode.start_s, reserve, floor)
        self.first = FleetSize(self._prefill[0], self._decode[0])

    def plan(self, seen: Observation) -> FleetSize:
        slot = min(int(seen.now_s / SLOT_S), len(self._prefill) - 1)
        return FleetSize(self._prefill[slot], self._decode[slot])


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """What one reserve and floor came to."""

    trace: str
    floor: float
    reserve: float
    attainment: float
    gpu_hours_vs_oracle: float


def measure_reach(
    trace: str,
    spec: FleetSpec,
    workload: Sequence[Arrival],
    slo: Slo,
    schedule: Schedule,
    *,
    oracle_gpu_hours: float,
    gpu_budget: int,
    measured_from_s: float,
) -> list[Reach]:
    """Attainment and cost of `RESERVES` on `FLOORS`: of each floor, up to the first that attains
    the oracle's share, or that costs more than one that does."""
    reached: list[Reach] = []
    for floor in FLOORS:
        for reserve in RESERVES:
            autoscaler = WithoutForesight(schedule, spec, reserve=reserve, floor=floor)
            outcome = run_scaled(
                spec,
                workload,
                autoscaler,
                slo,
                first=autoscaler.first,
                gpu_budget=gpu_budget,
                measured_from_s=measured_from_s,
            )
            reach = Reach(
                trace=trace,
                floor=floor,
                reserve=reserve,
                attainment=outcome.attainment,
                gpu_hours_vs_oracle=outcome.gpu_hours / oracle_gpu_hours,
            )
            best = cheapest(reached)
            reached.append(reach)
            if reach.attainment >= SHARE or (
                best is not None and reach.gpu_hours_vs_oracle > best.gpu_hours_vs_oracle
            ):
                break
    return reached


def cheapest(reached: Sequence[Reach]) -> Reach | None:
    """The one of least cost that attains the oracle's share."""
    return min(
        (each for each in reached if each.attainment >= SHARE),
        key=lambda each: each.gpu_hours_vs_oracle,
        default=None,
    )


def _held(needed: Sequence[int], start_s: float, reserve: float, floor: float) -> list[int]:
    """The most of the last start's time, and the reserve; the floor at least."""
    num_slots = math.ceil(start_s / SLOT_S)
    least = math.ceil(floor * max(needed))
    return [
        max(least, math.ceil((1 + reserve) * max(needed[max(0, slot - num_slots) : slot + 1])))
        for slot in range(len(needed))
    ]
