"""Tests of what the scaling plan expects of traffic: level, trend, steps, and the past's return."""

import math
from collections.abc import Callable
from statistics import fmean

import pytest
from scaling_traffic import counts_of

from cluster.scaling.forecast import Series, expect, prefill_work, requests
from cluster.scaling.replay import expected_again
from cluster.scaling.snapshot import Traffic

AHEAD_S = 40.0


def expected(rate: Callable[[float], float], *, seconds: int = 600, seed: int = 1) -> float:
    return expect(requests(counts_of(rate, seconds=seconds, seed=seed)), AHEAD_S)


def test_nothing_is_expected_of_nothing() -> None:
    assert expect(requests([]), AHEAD_S) == 0.0
    assert expect(requests([Traffic(duration_s=2.0)] * 50), AHEAD_S) == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_a_constant_rate_is_expected_to_stay(seed: int) -> None:
    assert expected(lambda now_s: 20.0, seed=seed) == pytest.approx(20.0, rel=0.15)


def test_chance_does_not_make_a_constant_rate_rise() -> None:
    forecasts = [expected(lambda now_s: 30.0, seed=seed) for seed in range(200)]
    assert max(forecasts) < 1.03 * 30.0


@pytest.mark.parametrize("slope", [0.15, -0.1])
def test_a_ramp_is_followed_to_when_a_replica_could_be_ready(slope: float) -> None:
    def rate(now_s: float) -> float:
        return max(20.0, 80.0 + slope * now_s)

    forecasts = [expected(rate, seed=seed) for seed in range(10)]
    assert fmean(forecasts) == pytest.approx(80.0 + slope * AHEAD_S, rel=0.1)
    assert all(60.0 < each < 100.0 for each in forecasts)


@pytest.mark.parametrize("seconds", [6, 10, 20, 30, 40, 100])
@pytest.mark.parametrize("seed", range(3))
def test_a_step_is_seen_in_seconds_and_not_taken_for_a_trend(seconds: int, seed: int) -> None:
    level = expected(lambda now_s: 60.0 if now_s > -seconds else 20.0, seed=seed)
    assert 40.0 < level < 70.0


@pytest.mark.parametrize("seed", range(3))
def test_a_burst_among_bursts_is_not_taken_for_a_trend(seed: int) -> None:
    """Earlier bursts make it hard to tell noise; a step is not a line for that."""

    def rate(now_s: float) -> float:
        return 80.0 if (now_s + 28) % 300 < 60 else 27.0

    assert expected(rate, seed=seed) < 95.0


def test_a_step_down_is_seen() -> None:
    assert expected(lambda now_s: 20.0 if now_s > -60 else 60.0) < 25.0


def test_longer_prompts_are_more_work() -> None:
    short = Traffic(duration_s=2.0, num_arrivals=20, prefill_s=2.0, prefill_squared_s2=0.2)
    long = Traffic(duration_s=2.0, num_arrivals=20, prefill_s=6.0, prefill_squared_s2=1.8)
    history = [short] * 200 + [long] * 10
    assert expect(requests(history), AHEAD_S) == pytest.approx(10.0)
    assert expect(prefill_work(history), AHEAD_S) == pytest.approx(3.0, rel=0.25)


def test_sums_start_at_nothing() -> None:
    series = requests([Traffic(duration_s=2.0, num_arrivals=3), Traffic(duration_s=2.0)])
    assert series == Series((0.0, 2.0, 4.0), (0, 3, 3), (0, 3, 3))
    assert series.loads == [(2.0, 1.5), (2.0, 0.0)]


@pytest.mark.parametrize(
    ("load", "then", "now", "again"),
    [
        (10.0, 10.0, 4.0, 4.0),
        (10.0, 4.0, 4.0, 10.0),
        (10.0, 7.0, 4.0, 7.0),
        (10.0, 10.0, 20.0, 10.0),
    ],
    ids=["foreseen", "unforeseen", "half", "never-more-than-it-was"],
)
def test_the_past_comes_again_as_far_as_it_was_unforeseen(
    load: float, then: float, now: float, again: float
) -> None:
    parts = expected_again([(2.0, load)], [(0.0, then)], now, [0.0], now_s=100.0, ahead_s=40.0)
    assert parts == pytest.approx((again / load,))


def test_what_a_season_would_have_foretold_was_no_surprise() -> None:
    came = [(10.0, 10.0), (10.0, 10.0)]
    parts = expected_again(came, [(0.0, 1.0)], 2.0, [0.0, 9.0], now_s=100.0, ahead_s=40.0)
    assert parts == pytest.approx((1.0, 0.3))


def test_a_forecast_counts_from_when_a_start_could_have_followed_it() -> None:
    forecasts = [(0.0, 1.0), (50.0, 10.0)]
    came = [(10.0, 10.0)] * 10
    parts = expected_again(came, forecasts, 1.0, [0.0] * 10, now_s=100.0, ahead_s=40.0)
    # Nothing was forecast in time for the first three; then too little; then enough.
    assert parts == pytest.approx((1.0,) * 8 + (0.1,) * 2)
    assert not any(map(math.isnan, parts))
