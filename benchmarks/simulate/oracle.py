"""A clairvoyant autoscaler: a small schedule of sizes that holds the targets, knowing the future.

Found by trial: it starts below what the work would take as a fluid, runs, adds a replica wherever
requests missed, and runs again. Starts come early by the start time; dips shorter than a start are
not worth one and stay filled. An upper bound on the true optimum, close to it where replicas are
many.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.simulate.demand import decode_requests_per_s, mean_shape, prefill_work_s
from benchmarks.simulate.fleet import FleetSpec
from benchmarks.simulate.history import Observation
from benchmarks.simulate.requests import Arrival, Slo
from benchmarks.simulate.scaled_run import FleetSize, Outcome, run_scaled

SLOT_S = 5.0
SHARE = 0.99
SPARE_SHARE = 0.995
"""A pool whose target more than this share of requests meet is tried smaller."""
FIRST_LOAD = 0.9
"""Replicas' load in the first trial."""
LOAD_STEP = 1.15
MAX_TRIALS = 14


@dataclass(slots=True)
class Schedule:
    """Replicas needed per slot of `SLOT_S`."""

    prefill: list[int]
    decode: list[int]


class Clairvoyant:
    """An autoscaler that follows a schedule; replicas are asked for as early as they must be."""

    period_s = SLOT_S

    def __init__(self, schedule: Schedule, spec: FleetSpec) -> None:
        assert spec.decode is not None
        self._prefill = _asked(schedule.prefill, spec.prefill.start_s)
        self._decode = _asked(schedule.decode, spec.decode.start_s)
        self.first = FleetSize(self._prefill[0], self._decode[0])

    def plan(self, seen: Observation) -> FleetSize:
        slot = min(int(seen.now_s / SLOT_S), len(self._prefill) - 1)
        return FleetSize(self._prefill[slot], self._decode[slot])


def find_schedule(
    spec: FleetSpec,
    workload: Sequence[Arrival],
    slo: Slo,
    *,
    gpu_budget: int,
    measured_from_s: float = 0.0,
) -> tuple[Schedule, Outcome]:
    """The cheapest schedule found that holds `SHARE`, or the one that comes nearest, and its run.

    Each pool's load is raised, by itself, until its target no longer holds; what then misses is
    repaired.
    """
    loads = [FIRST_LOAD, FIRST_LOAD]
    schedule = _fluid_schedule(spec, workload, slo, loads)
    best: tuple[Schedule, Outcome] | None = None
    is_repairing = [False, False]
    for _ in range(MAX_TRIALS):
        autoscaler = Clairvoyant(schedule, spec)
        outcome = run_scaled(
            spec,
            workload,
            autoscaler,
            slo,
            first=autoscaler.first,
            gpu_budget=gpu_budget,
            measured_from_s=measured_from_s,
        )
        if best is None or _is_better(outcome, best[1]):
            best = schedule, outcome
        shares = (outcome.ttft_attainment, outcome.itl_attainment)
        lower = _fluid_schedule(spec, workload, slo, [load * LOAD_STEP for load in loads])
        repaired = _repaired(schedule, outcome, slo)
        pools = [schedule.prefill, schedule.decode]
        for pool, share in enumerate(shares):
            if share > SPARE_SHARE and not is_repairing[pool]:
                loads[pool] *= LOAD_STEP
                pools[pool] = (lower.prefill, lower.decode)[pool]
            elif outcome.attainment < SHARE and share < (1 + SHARE) / 2:
                is_repairing[pool] = True
                pools[pool] = (repaired.prefill, repaired.decode)[pool]
        if pools == [schedule.prefill, schedule.decode]:
            break
        schedule = Schedule(prefill=pools[0], decode=pools[1])
    assert best is not None
    return best


def _is_better(one: Outcome, other: Outcome) -> bool:
    if min(one.attainment, other.attainment) >= SHARE:
        return one.gpu_hours < other.gpu_hours
    return one.attainment > other.attainment


def _fluid_schedule(
    spec: FleetSpec, workload: Sequence[Arrival], slo: Slo, loads: Sequence[float]
) -> Schedule:
    assert spec.decode is not None
    num_slots = int(workload[-1].arrival_s / SLOT_S) + 2
    shape = mean_shape(workload, spec.prefill)
    prefill_s, decode_load = [0.0] * num_slots, [0.0] * num_slots
    # A decode replica's worth of seconds per output token, at the batch that ITL allows.
    per_token = 1 / decode_requests_per_s(spec.decode, shape, slo.itl_s) / shape.output_tokens
    for each in workload:
        slot = int(each.arrival_s / SLOT_S)
        prefill_s[slot] += prefill_work_s(spec.prefill, each.prompt_tokens)
        weight = (each.prompt_tokens + each.output_tokens / 2) / shape.context_tokens
        num_slots_held = max(int(each.output_tokens * slo.itl_s / SLOT_S), 1)
        for held in range(slot, min(slot + num_slots_held, num_slots)):
            decode_load[held] += each.output_tokens * per_token * weight / num_slots_held
    return Schedule(
        prefill=_replicas(prefill_s, loads[0]),
        decode=_replicas(decode_load, loads[1]),
    )


def _replicas(work_s: Sequence[float], load: float) -> list[int]:
    """Replicas that are so loaded by the work of their slot and its neighbours."""
    padded = [work_s[0], *work_s, work_s[-1]]
    means = (sum(padded[slot : slot + 3]) / 3 for slot in range(len(work_s)))
    return [max(math.ceil(mean / SLOT_S / load), 1) for mean in means]


def _repaired(schedule: Schedule, outcome: Outcome, slo: Slo) -> Schedule:
    """More replicas around the slots where most requests missed, not where few did: those are what
    the share allows."""
    num_slots = len(schedule.prefill)
    late, slow = [0] * num_slots, [0] * num_slots
    for arrival_s, is_late, is_slow in outcome.missed:
        slot = min(int(arrival_s / SLOT_S), num_slots - 1)
        late[slot] += is_late
        slow[slot] += is_slow
    allowed = (1 - SHARE) * outcome.num_requests / 2
    patience = math.ceil(slo.ttft_s / SLOT_S)
    return Schedule(
        prefill=_raised(schedule.prefill, _worst(late, allowed), before=patience, after=1),
        decode=_raised(schedule.decode, _worst(slow, allowed), before=1, after=4),
    )


def _worst(missed: Sequence[int], allowed: float) -> list[int]:
    """The slots with most misses, without as many as have `allowed` between them."""
    slots = sorted((slot for slot, count in enumerate(missed) if count), key=missed.__getitem__)
    for place, slot in enumerate(slots):
        allowed -= missed[slot]
        if allowed < 0:
            return slots[place:]
    return []


def _raised(replicas: Sequence[int], slots: Sequence[int], *, before: int, after: int) -> list[int]:
    """One more, or a tenth, from `before` to `after` each of the slots."""
    raised = list(replicas)
    for slot in slots:
        for each in range(max(slot - before, 0), min(slot + after + 1, len(replicas))):
            raised[each] = replicas[each] + max(1, replicas[each] // 10)
    return raised


def _asked(needed: Sequence[int], start_s: float) -> list[int]:
    """When replicas must be asked for: each level's gaps shorter than a start filled, all starts
    early."""
    early = math.ceil(start_s / SLOT_S)
    asked = [1] * len(needed)
    for level in range(2, max(needed) + 1):
        slots = [slot for slot, count in enumerate(needed) if count >= level]
        start = slots[0]
        for slot, following in zip(slots, [*slots[1:], math.inf], strict=True):
            if following - slot - 1 > early:
                for each in range(max(start - early, 0), slot + 1):
                    asked[each] = max(asked[each], level)
                start = int(following) if following != math.inf else start
    return asked
