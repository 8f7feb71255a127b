"""Tests of what is measured of prompts: which are like the latest, and a replay's waits."""

import random
from collections.abc import Sequence

import pytest

from cluster.scaling.history import measure_demand, unshifted
from cluster.scaling.prefill import replay_share, wait_tail, wait_tail_within
from cluster.scaling.snapshot import Traffic


def prompts(mean_s: float, *, buckets: int, rate: int = 20, seed: int = 1) -> list[Traffic]:
    """Buckets of 2 s with exponential prompts."""
    rng = random.Random(seed)
    drawn = [[rng.expovariate(1 / mean_s) for _ in range(2 * rate)] for _ in range(buckets)]
    return [
        Traffic(
            duration_s=2.0,
            num_arrivals=len(each),
            prefill_s=sum(each),
            prefill_squared_s2=sum(work_s**2 for work_s in each),
        )
        for each in drawn
    ]


def mean_prefill_s(history: Sequence[Traffic]) -> float:
    return measure_demand(unshifted(history), output_tokens=None).prefill_s


@pytest.mark.parametrize("seed", range(10))
def test_prompts_that_stay_are_measured_far_back(seed: int) -> None:
    history = prompts(0.1, buckets=256, seed=seed)
    assert len(unshifted(history)) >= 32


@pytest.mark.parametrize("after_s", [0.05, 0.25])
@pytest.mark.parametrize("seed", range(5))
def test_a_shift_is_followed_within_seconds(after_s: float, seed: int) -> None:
    history = prompts(0.1, buckets=256, seed=seed) + prompts(after_s, buckets=4, seed=seed + 100)
    assert mean_prefill_s(history) == pytest.approx(after_s, rel=0.3)


def test_too_few_prompts_are_all_measured() -> None:
    history = prompts(0.1, buckets=3, rate=1)
    assert unshifted(history) == tuple(history)
    assert unshifted([]) == ()


DEMAND = measure_demand(prompts(0.1, buckets=100), output_tokens=None)


@pytest.mark.parametrize("utilisation", [0.5, 0.8, 0.95])
def test_a_load_that_lasts_brings_the_waits_of_a_steady_state(utilisation: float) -> None:
    brief, long = (
        wait_tail_within(4, DEMAND, utilisation, 0.3, duration_s=duration_s)
        for duration_s in (0.5, 1e4)
    )
    assert brief < long
    assert long == pytest.approx(wait_tail(4, DEMAND, utilisation, 0.3))


def test_a_full_bucket_does_not_bring_the_waits_of_a_full_hour() -> None:
    history = prompts(0.1, buckets=100)
    demand = measure_demand(history, output_tokens=None)
    loads = [1.0] * len(history)
    # 3 replicas at 2 / 3: chance hardly gathers a wait of 2 s within a bucket of 2 s.
    share = replay_share(history, loads, demand, 3, patience_s=2.0, correction=1.0)
    assert share > 0.9975
    assert replay_share(history, loads, demand, 2, patience_s=2.0, correction=1.0) < 0.9
