"""Tests of load that comes back: what is taken for a season, what it foretells, what is planned."""

import math
import random
from collections.abc import Callable

import pytest
from scaling_traffic import counts_of

from cluster.scaling.forecast import requests
from cluster.scaling.season import Season, find_season
from cluster.scaling.snapshot import Traffic

LOOK_BACK_S = 600.0


def bursts(now_s: float, *, period_s: float = 300.0, burst_s: float = 60.0) -> float:
    """Three times the load at the end of each period; one has just ended at 0 s."""
    return 60.0 if now_s % period_s >= period_s - burst_s else 20.0


def found(rate: Callable[[float], float], *, seconds: int = 1200, seed: int = 1) -> Season | None:
    return find_season(requests(counts_of(rate, seconds=seconds, seed=seed)), LOOK_BACK_S)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("rate", "period_s", "seconds"),
    [
        pytest.param(bursts, 300, 600, id="two-bursts"),
        pytest.param(bursts, 300, 1200, id="four-bursts"),
        pytest.param(lambda t: bursts(t + 130), 300, 700, id="between-bursts"),
        pytest.param(lambda t: bursts(t + 30), 300, 700, id="within-a-burst"),
        pytest.param(lambda t: bursts(t, period_s=200, burst_s=30), 200, 900, id="short"),
        pytest.param(lambda t: bursts(t, period_s=437, burst_s=50), 437, 900, id="odd"),
        pytest.param(lambda t: bursts(t) * (1 - t / 3000), 300, 1200, id="that-declines"),
        pytest.param(
            lambda t: 30 - 20 * math.cos(2 * math.pi * t / 400), 400, 1000, id="sinusoidal"
        ),
    ],
)
def test_a_load_that_repeats_itself_is_a_season(
    rate: Callable[[float], float], period_s: float, seconds: int, seed: int
) -> None:
    season = found(rate, seconds=seconds, seed=seed)
    assert season is not None
    assert season.period_s == pytest.approx(period_s, abs=10.0)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    "rate",
    [
        pytest.param(lambda t: 30.0, id="constant"),
        pytest.param(lambda t: 0.5, id="rare"),
        pytest.param(lambda t: 80 + 0.05 * t, id="ramp"),
        pytest.param(lambda t: 60.0 if t > -300 else 20.0, id="step"),
        pytest.param(lambda t: 60.0 if -500 < t < -200 else 20.0, id="step-and-back"),
        pytest.param(lambda t: 60.0 if -100 < t < -40 else 20.0, id="one-burst"),
        pytest.param(lambda t: 60 - 50 * math.cos(2 * math.pi * t / 1800), id="one-wave"),
    ],
)
def test_a_load_that_does_not_is_none(rate: Callable[[float], float], seed: int) -> None:
    for seconds in (600, 1200):
        assert found(rate, seconds=seconds, seed=seed) is None


def test_a_random_walk_is_rarely_taken_for_one() -> None:
    def is_found(seed: int, *, decay: float) -> bool:
        """The logarithm walks by up to a third of itself, and is drawn back over 1 / `decay` s."""
        rng = random.Random(seed)
        log, logs = 0.0, []
        for _ in range(601):
            log += rng.gauss(0, 0.4 * math.sqrt(4 * decay or 0.01)) - 2 * decay * log
            logs.append(log)
        return found(lambda t: 30 * math.exp(logs[round(-t / 2)]), seed=seed) is not None

    for decay in (0.0, 1 / 20, 1 / 60, 1 / 200):
        assert sum(is_found(seed, decay=decay) for seed in range(40)) <= 2


def test_nothing_is_no_season() -> None:
    assert find_season(requests([]), LOOK_BACK_S) is None
    assert find_season(requests([Traffic(duration_s=2.0)] * 600), LOOK_BACK_S) is None


@pytest.mark.parametrize(
    ("ago_s", "until_s", "is_high"),
    [
        pytest.param(0, 40, True, id="just-after-a-burst"),
        pytest.param(20, 40, False, id="after-a-burst"),
        pytest.param(100, 40, False, id="between-bursts"),
        pytest.param(180, 40, False, id="long-before"),
        pytest.param(205, 40, True, id="a-start-before"),
        pytest.param(235, 0, True, id="just-before"),
        pytest.param(280, 0, True, id="within"),
    ],
)
@pytest.mark.parametrize("seconds", [620, 1200])
def test_the_next_burst_is_foretold_and_the_calm_too(
    ago_s: float, until_s: float, is_high: bool, seconds: int
) -> None:
    season = found(lambda t: bursts(t + ago_s), seconds=seconds)
    assert season is not None
    load = season.peak(until_s)
    assert 55 < load < 75 if is_high else 18 < load < 28


def test_the_one_burst_foretells_the_other() -> None:
    series = requests(counts_of(lambda t: bursts(t + 100), seconds=620, seed=1))
    season = find_season(series, LOOK_BACK_S)
    assert season is not None
    says = dict(zip(series.seconds[1:], season.predicted(series), strict=True))
    # One block early or late.
    assert {each - 620 for each in says if says[each] > 50} == {
        each for each in range(-618, 2, 2) if -470 < each < -388 or -170 < each < -88
    }


def test_a_burst_that_did_not_come_ends_the_season() -> None:
    assert found(lambda t: 20.0 if t > -200 else bursts(t + 100)) is None


@pytest.mark.parametrize(
    ("load", "is_surprise"), [(20.0, False), (24.0, False), (60.0, True)], ids=str
)
def test_more_than_was_foretold_is_a_surprise(load: float, is_surprise: bool) -> None:
    series = requests(
        counts_of(lambda t: load if t > -10 else bursts(t + 150), seconds=1200, seed=1)
    )
    season = find_season(series, LOOK_BACK_S)
    assert season is not None
    assert season.is_surprised(series, 40.0) == is_surprise
