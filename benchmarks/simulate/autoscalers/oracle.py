"""A clairvoyant autoscaler: a small schedule of sizes that holds the targets, knowing the future.

Found by trial: it starts below what the work would take as a fluid, runs, adds a replica wherever
requests missed, and runs again. Of what then holds the targets it takes away the replicas that do
least for what they cost, as many as the misses that are allowed permit. Starts come early by the
start time; dips shorter than a start are not worth one and stay filled. An upper bound on the true
optimum, close to it where replicas are many.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.simulate.model.fleet import FleetSpec
from benchmarks.simulate.model.history import Observation
from benchmarks.simulate.model.requests import Arrival
from benchmarks.simulate.model.scaled_run import FleetSize, Outcome, run_scaled
from benchmarks.simulate.workloads.demand import decode_requests_per_s, mean_shape, prefill_work_s
from router.slo import Slo

SLOT_S = 5.0
SHARE = 0.99
SPARE_SHARE = 0.995
"""A pool whose target more than this share of requests meet is tried smaller."""
FIRST_LOAD = 0.9
"""Replicas' load in the first trial."""
LOAD_STEP = 1.15
MAX_TRIALS = 14
NUM_TRIMS = 1


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


class _Trials:
    """Owns the best schedule so far, and its run."""

    def __init__(
        self,
        spec: FleetSpec,
        workload: Sequence[Arrival],
        slo: Slo,
        *,
        gpu_budget: int,
        measured_from_s: float,
    ) -> None:
        self.best: tuple[Schedule, Outcome] | None = None
        self._run = partial(
            run_scaled, spec, workload, gpu_budget=gpu_budget, measured_from_s=measured_from_s
        )
        self._spec, self._slo = spec, slo

    def run(self, schedule: Schedule) -> Outcome:
        autoscaler = Clairvoyant(schedule, self._spec)
        outcome = self._run(autoscaler, self._slo, first=autoscaler.first)
        if self.best is None or _is_better(outcome, self.best[1]):
            self.best = schedule, outcome
        return outcome


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
    repaired; what is left of the misses that are allowed is spent.
    """
    trials = _Trials(spec, workload, slo, gpu_budget=gpu_budget, measured_from_s=measured_from_s)
    demand = _fluid_demand(spec, workload, slo)
    loads = [FIRST_LOAD, FIRST_LOAD]
    schedule = _fluid_schedule(demand, loads)
    is_repairing = [False, False]
    for _ in range(MAX_TRIALS):
        outcome = trials.run(schedule)
        shares = (outcome.ttft_attainment, outcome.itl_attainment)
        lower = _fluid_schedule(demand, [load * LOAD_STEP for load in loads])
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
    for _ in range(NUM_TRIMS):
        _trim(trials, spec, demand)
    assert trials.best is not None
    return trials.best


def _trim(trials: _Trials, spec: FleetSpec, demand: Sequence[Sequence[float]]) -> None:
    """Tries the best schedule without the stretches of replicas that do least for what they cost:
    as many of them as the targets allow, by bisection."""
    assert trials.best is not None
    schedule, outcome = trials.best
    if outcome.attainment < SHARE:
        return
    early = math.ceil(spec.prefill.start_s / SLOT_S)
    stretches = sorted(
        (
            _harm(pool, work, first, last) / (last - first + 1 + early),
            which,
            first,
            last,
        )
        for which, (pool, work) in enumerate(
            zip((schedule.prefill, schedule.decode), demand, strict=True)
        )
        for level in range(2, max(pool) + 1)
        for first, last in _stretches(pool, level, early)
    )
    least, most = 0, len(stretches)
    while most - least > 0:
        tried = (least + most + 1) // 2
        pools = [list(schedule.prefill), list(schedule.decode)]
        for _, which, first, last in stretches[:tried]:
            for slot in range(first, last + 1):
                pools[which][slot] = max(1, pools[which][slot] - 1)
        if trials.run(Schedule(prefill=pools[0], decode=pools[1])).attainment >= SHARE:
            least = tried
        else:
            most = tried - 1


def _harm(pool: Sequence[int], work: Sequence[float], first: int, last: int) -> float:
    """Replica slots of work that one replica less leaves over, from the first slot to the last."""
    slots = range(first, last + 1)
    return sum(min(1.0, max(0.0, work[slot] - (pool[slot] - 1))) for slot in slots)


def _is_better(one: Outcome, other: Outcome) -> bool:
    if min(one.attainment, other.attainment) >= SHARE:
        return one.gpu_hours < other.gpu_hours
    return one.attainment > other.attainment


def _fluid_demand(
    spec: FleetSpec, workload: Sequence[Arrival], slo: Slo
) -> tuple[list[float], list[float]]:
    """Replicas' worth of work in each slot: of prefill, and of decode at the batch that ITL
    allows. Each slot's with that of its neighbours, in the mean."""
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
    return _smooth(prefill_s), _smooth(decode_load)


def _smooth(work_s: Sequence[float]) -> list[float]:
    padded = [work_s[0], *work_s, work_s[-1]]
    return [sum(padded[slot : slot + 3]) / 3 / SLOT_S for slot in range(len(work_s))]


def _fluid_schedule(demand: Sequence[Sequence[float]], loads: Sequence[float]) -> Schedule:
    """Replicas that are so loaded by the demand."""
    prefill, decode = (
        [max(math.ceil(each / load), 1) for each in work]
        for work, load in zip(demand, loads, strict=True)
    )
    return Schedule(prefill=prefill, decode=decode)


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
        for first, last in _stretches(needed, level, early):
            for each in range(max(first - early, 0), last + 1):
                asked[each] = max(asked[each], level)
    return asked


def _stretches(needed: Sequence[int], level: int, gap: int) -> list[tuple[int, int]]:
    """First and last slot of each stretch that needs so many; gaps up to `gap` do not end one."""
    slots = [slot for slot, count in enumerate(needed) if count >= level]
    stretches: list[tuple[int, int]] = []
    for slot in slots:
        if stretches and slot - stretches[-1][1] - 1 <= gap:
            stretches[-1] = stretches[-1][0], slot
        else:
            stretches.append((slot, slot))
    return stretches
