"""Load that comes back: whether the last period was like the one before, and what is next. Pure.

Two periods that are alike are all that is asked for: who has seen two bursts five minutes apart
expects a third. What does not come as foretold ends the season at once.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from cluster.scaling.forecast import Series, surprises

BLOCK_S = 10.0
"""In which periods are compared: what comes back may come so much earlier or later."""

MIN_BLOCKS = 6
"""Of a period."""

MAX_PERIODS = 4
"""That are compared."""

MAX_UNEXPLAINED = 0.15
"""Of the load's variance, noise taken off, that two periods of a season may not share."""

MIN_VARIATION = 0.2
"""Standard deviation of a season's load over its mean: with less, there is nothing to foretell."""

MIN_SIGNAL = 2.0
"""Variance of a season's load over that of its noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Season:
    """Amounts per second of the last two periods, in as many blocks each, the last ending now."""

    period_s: float
    earlier: tuple[float, ...]
    latest: tuple[float, ...]

    def foretold_peak(self, within_s: float) -> float:
        """The most that the earlier period said of the last `within_s`."""
        return self._peak(self.earlier, -within_s, 0.0)

    def peak(self, begin_s: float, end_s: float) -> float:
        """The most that is foretold from `begin_s` to `end_s` from now, each not before now."""
        mean = [(a + b) / 2 for a, b in zip(self.earlier, self.latest, strict=True)]
        return self._peak(mean, begin_s, end_s)

    def foretold(self, age_s: float) -> float:
        """What the one period says of the other, `age_s` ago."""
        other = self.earlier if age_s < self.period_s else self.latest
        return self._peak(other, -age_s, -age_s)

    def _peak(self, blocks: Sequence[float], begin_s: float, end_s: float) -> float:
        width_s = self.period_s / len(blocks)
        first = math.floor(begin_s / width_s) - 1
        last = math.floor(end_s / width_s) + 1
        return max(blocks[i % len(blocks)] for i in range(first, last + 1))


def find_season(series: Series) -> Season | None:
    """The period by which the series repeats itself best, if it does.

    By phase dispersion minimisation (Stellingwerf 1978) over all periods that the series has: of
    the variance, the part within phases is to be small against the whole; of both is taken what the
    random portions do.
    """
    num = int(series.seconds[-1] / BLOCK_S)
    blocks = _Blocks.last(series, num, BLOCK_S)
    lags = range(MIN_BLOCKS, num // 2 + 1)
    if not lags:
        return None
    best = min(lags, key=blocks.unexplained)
    if blocks.unexplained(best) > 2 * MAX_UNEXPLAINED:
        return None
    # Blocks are a little more or less than BLOCK_S wide, so that they fill a period.
    fits = []
    for shift_s in range(-6, 7, 2):
        width_s = BLOCK_S + shift_s / best
        periods = min(MAX_PERIODS, int(series.seconds[-1] / width_s / best))
        if periods > 1:
            fits.append(_Blocks.last(series, periods * best, width_s))
    fit = min(fits, key=lambda each: each.unexplained(best))
    if fit.unexplained(best) > MAX_UNEXPLAINED:
        return None
    loads = tuple(each / fit.width_s for each in fit.amounts)
    return Season(
        period_s=best * fit.width_s, earlier=loads[-2 * best : -best], latest=loads[-best:]
    )


def is_surprised(series: Series, season: Season, within_s: float) -> bool:
    return surprises(series, season.foretold_peak(within_s), within_s)


@dataclass(frozen=True, slots=True)
class _Blocks:
    """The end of a series in blocks of equal width, oldest first."""

    width_s: float
    amounts: tuple[float, ...]
    squares: tuple[float, ...]

    @classmethod
    def last(cls, series: Series, num: int, width_s: float) -> "_Blocks":
        edges = [max(0.0, series.seconds[-1] - i * width_s) for i in range(num, -1, -1)]
        amounts = [_at(series, series.amounts, each) for each in edges]
        squares = [_at(series, series.squares, each) for each in edges]
        return cls(
            width_s,
            tuple(b - a for a, b in pairwise(amounts)),
            tuple(b - a for a, b in pairwise(squares)),
        )

    def unexplained(self, lag: int) -> float:
        """Of the variance over whole periods of `lag` blocks, the part that they do not share; 1
        where there is little but noise."""
        periods = min(MAX_PERIODS, len(self.amounts) // lag)
        amounts, squares = self.amounts[-periods * lag :], self.squares[-periods * lag :]
        mean, noise = sum(amounts) / len(amounts), sum(squares)
        total = sum(each * each for each in amounts) - len(amounts) * mean**2 - noise
        if total <= max(MIN_SIGNAL * noise, len(amounts) * (MIN_VARIATION * mean) ** 2):
            return 1.0
        phases = [sum(amounts[i::lag]) for i in range(lag)]
        within = sum(each * each for each in amounts) - sum(each * each for each in phases) / periods
        # `periods` values share a mean: of their noise, a part is in it.
        return (within - noise * (1 - 1 / periods)) / total * periods / (periods - 1) / 2


def _at(series: Series, sums: Sequence[float], time_s: float) -> float:
    """A sum at a time within a bucket, as if it had come evenly."""
    place = min(max(1, bisect_left(series.seconds, time_s)), series.size)
    begin_s, end_s = series.seconds[place - 1], series.seconds[place]
    part = (time_s - begin_s) / (end_s - begin_s)
    return sums[place - 1] + part * (sums[place] - sums[place - 1])
