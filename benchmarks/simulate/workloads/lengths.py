"""Synthetic lengths and arrivals, for workloads that no trace holds. Deterministic by seed."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.simulate.model.requests import Arrival


@dataclass(frozen=True, slots=True, kw_only=True)
class Lognormal:
    """A lognormal by its mean and its sigma, drawn again while outside of [least, most]."""

    mean: float
    sigma: float
    least: int = 1
    most: int = 1_000_000

    def draw(self, rng: random.Random) -> int:
        mu = math.log(self.mean) - self.sigma**2 / 2
        while True:
            value = round(rng.lognormvariate(mu, self.sigma))
            if self.least <= value <= self.most:
                return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Normal:
    """A normal by its mean and sigma before it is truncated to [least, most]."""

    mean: float
    sigma: float
    least: int = 1
    most: int = 1_000_000

    def draw(self, rng: random.Random) -> int:
        while True:
            value = round(rng.gauss(self.mean, self.sigma))
            if self.least <= value <= self.most:
                return value


def poisson(
    rate: Callable[[float], float],
    *,
    most: float,
    duration_s: float,
    lengths: Callable[[float, random.Random], tuple[int, int]],
    seed: int,
) -> list[Arrival]:
    """Arrivals at `rate(time_s)` a second, never above `most`, by thinning (Lewis and Shedler).

    Args:
        lengths: prompt and output tokens of a request that arrives at a time.
    """
    rng = random.Random(seed)
    arrivals, time_s = [], 0.0
    while (time_s := time_s + rng.expovariate(most)) < duration_s:
        if rng.random() * most < rate(time_s):
            arrivals.append(Arrival(time_s, *lengths(time_s, rng)))
    return arrivals
