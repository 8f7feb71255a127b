"""What the oracle asks for, and what is left of it for those who do not know the future."""

import pytest

from benchmarks.simulate.autoscalers.foresight import WithoutForesight, cheapest, measure_reach
from benchmarks.simulate.autoscalers.oracle import (
    SHARE,
    SLOT_S,
    Clairvoyant,
    Schedule,
    find_schedule,
)
from benchmarks.simulate.model.fleet import FleetSpec
from benchmarks.simulate.model.profiles import LLAMA_8B_H100
from benchmarks.simulate.model.requests import Arrival
from router.slo import Slo

SPEC = FleetSpec(prefill=LLAMA_8B_H100, decode=LLAMA_8B_H100, ttft_s=1.0)
START_SLOTS = int(LLAMA_8B_H100.start_s / SLOT_S)


def step(*, before: float, after: float) -> list[Arrival]:
    """400 s of prompts of 0.1 s of work each: the load rises halfway."""
    arrivals, time_s = [], 0.0
    while time_s < 400.0:
        arrivals.append(Arrival(time_s, 4000, 20))
        time_s += 0.11 / (before if time_s < 200.0 else after)
    return arrivals


def test_the_oracle_starts_early_and_keeps_what_a_short_dip_would_end() -> None:
    needed = [1] * 20 + [3] * 4 + [1] * 4 + [3] * 4 + [1] * 20
    oracle = Clairvoyant(Schedule(prefill=needed, decode=[1] * len(needed)), SPEC)
    sizes = [oracle._prefill[slot] for slot in range(len(needed))]
    assert sizes == [1] * (20 - START_SLOTS) + [3] * (START_SLOTS + 12) + [1] * 20


def test_without_foresight_replicas_are_asked_for_when_they_are_due() -> None:
    needed = [1] * 20 + [2] * 4 + [1] * 28
    blind = WithoutForesight(Schedule(prefill=needed, decode=[1] * len(needed)), SPEC, reserve=0.5)
    assert blind._prefill == [2] * 20 + [3] * (4 + START_SLOTS) + [2] * (28 - START_SLOTS)


def test_without_foresight_a_floor_is_kept_all_the_time() -> None:
    needed = [1] * 20 + [8] * 4 + [1] * 28
    schedule = Schedule(prefill=needed, decode=[1] * len(needed))
    blind = WithoutForesight(schedule, SPEC, reserve=0.0, floor=0.5)
    assert blind._prefill == [4] * 20 + [8] * (4 + START_SLOTS) + [4] * (28 - START_SLOTS)
    assert set(blind._decode) == {1}


def test_a_step_is_free_for_the_oracle_and_costs_others_a_reserve() -> None:
    workload, slo = step(before=0.8, after=2.0), Slo(ttft_s=1.0, itl_s=0.05)
    schedule, outcome = find_schedule(SPEC, workload, slo, gpu_budget=16)
    assert outcome.attainment >= SHARE
    reached = measure_reach(
        "step",
        SPEC,
        workload,
        slo,
        schedule,
        oracle_gpu_hours=outcome.gpu_hours,
        gpu_budget=16,
        measured_from_s=0.0,
    )
    without_floor = [each for each in reached if each.floor == 0]
    assert without_floor[0].attainment < 0.95
    assert without_floor[-1].attainment >= SHARE
    assert without_floor[-1].gpu_hours_vs_oracle > 1.5 * without_floor[0].gpu_hours_vs_oracle
    # What is kept for good costs less than what is started for nothing, and more than to know.
    best = cheapest(reached)
    assert best is not None
    assert best.floor > 0
    assert 1.0 < best.gpu_hours_vs_oracle <= without_floor[-1].gpu_hours_vs_oracle


def test_the_oracle_spends_the_misses_that_are_allowed() -> None:
    """A rise of a second, in which less than a hundredth of the requests come, buys no replica."""
    workload = step(before=0.5, after=0.5)
    burst = [Arrival(300.0 + 0.05 * each, 4000, 20) for each in range(15)]
    arrivals = sorted([*workload, *burst], key=lambda each: each.arrival_s)
    slo = Slo(ttft_s=1.0, itl_s=0.05)
    _, calm = find_schedule(SPEC, workload, slo, gpu_budget=16)
    _, outcome = find_schedule(SPEC, arrivals, slo, gpu_budget=16)
    assert outcome.attainment >= SHARE
    assert outcome.gpu_hours == pytest.approx(calm.gpu_hours, rel=0.01)
