"""What can be had without knowing the future: the oracle's schedule, asked for when it is due.

Owns the autoscaler that does so. Knows no policy's rules and no trace.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.simulate.fleet import FleetSpec
from benchmarks.simulate.history import Observation
from benchmarks.simulate.oracle import SLOT_S, Schedule
from benchmarks.simulate.requests import Arrival, Slo
from benchmarks.simulate.scaled_run import FleetSize, run_scaled

RESERVES = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0)
"""On top of what is needed, as parts of it."""


class WithoutForesight:
    """Knows at every moment what the oracle needs just then, exactly and at once, and nothing of
    what comes.

    It keeps a reserve of so many times that, and lets a replica go once it has not been needed for
    as long as a start takes: an idle replica has then cost what a start costs, so no rule that does
    not know the future is sure to lose less (ski rental).
    """

    period_s = SLOT_S

    def __init__(self, schedule: Schedule, spec: FleetSpec, *, reserve: float) -> None:
        assert spec.decode is not None
        self._prefill = _held(schedule.prefill, spec.prefill.start_s, reserve)
        self._decode = _held(schedule.decode, spec.decode.start_s, reserve)
        self.first = FleetSize(self._prefill[0], self._decode[0])

    def plan(self, seen: Observation) -> FleetSize:
        slot = min(int(seen.now_s / SLOT_S), len(self._prefill) - 1)
        return FleetSize(self._prefill[slot], self._decode[slot])


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """What one reserve came to."""

    trace: str
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
    """Attainment and cost of each of `RESERVES`."""
    reached = []
    for reserve in RESERVES:
        autoscaler = WithoutForesight(schedule, spec, reserve=reserve)
        outcome = run_scaled(
            spec,
            workload,
            autoscaler,
            slo,
            first=autoscaler.first,
            gpu_budget=gpu_budget,
            measured_from_s=measured_from_s,
        )
        reached.append(
            Reach(
                trace=trace,
                reserve=reserve,
                attainment=outcome.attainment,
                gpu_hours_vs_oracle=outcome.gpu_hours / oracle_gpu_hours,
            )
        )
    return reached


def _held(needed: Sequence[int], start_s: float, reserve: float) -> list[int]:
    """The most of the last start's time, and the reserve."""
    num_slots = math.ceil(start_s / SLOT_S)
    return [
        math.ceil((1 + reserve) * max(needed[max(0, slot - num_slots) : slot + 1]))
        for slot in range(len(needed))
    ]
