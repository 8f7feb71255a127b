"""Load that comes back: whether the last period was like the one before, and what is next. Pure.

Two periods that are alike are all that is asked for: who has seen two bursts five minutes apart
expects a third. What does not come as foretold ends the season at once.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from cluster.scaling.forecast import Series, exceeds

BLOCK_S = 10.0
"""In which periods are compared: what comes back may come so much earlier or later."""

MIN_BLOCKS = 6
"""Of a period."""

MAX_PERIODS = 4
"""That are compared."""

MAX_UNEXPLAINED = 0.3
"""Of the load's variance, noise taken off, that two periods of a season may not share."""

MIN_VARIATION = 0.2
"""Standard deviation of a season's load over its mean: with less, there is nothing to foretell."""

MIN_SIGNAL = 2.0
"""Variance of a season's load over that of its noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Season:
    """Amounts per second in the periods that are alike."""

    period_s: float
    periods: tuple[tuple[float, ...], ...]
    """Latest first, each in as many blocks, oldest first; the last ends now."""

    def peak(self, until_s: float) -> float:
        """The most that any period says of the time from now to `until_s` from now."""
        return _peak(self._envelope(self.periods), 0.0, until_s / self._block_s)

    def is_surprised(self, series: Series, within_s: float) -> bool:
        """Whether more came within the last `within_s` than earlier periods say, for certain."""
        before = self._envelope(self.periods[1:])
        return exceeds(series, _peak(before, -within_s / self._block_s, 0.0), within_s)

    def foretold(self, series: Series) -> tuple[float, ...]:
        """Of each bucket, the most that the other periods say."""
        others = [
            self._envelope((*self.periods[:i], *self.periods[i + 1 :]))
            for i in range(len(self.periods))
        ]
        others.append(self._envelope(self.periods))
        around = [
            tuple(_peak(each, i - len(each), i - len(each)) for i in range(len(each)))
            for each in others
        ]
        loads = []
        for end_s in series.seconds[1:]:
            num_back = math.floor((end_s - series.seconds[-1]) / self._block_s - 1e-6)
            period = min(-(num_back + 1) // len(self.periods[0]), len(others) - 1)
            loads.append(around[period][num_back % len(self.periods[0])])
        return tuple(loads)

    @property
    def _block_s(self) -> float:
        return self.period_s / len(self.periods[0])

    def _envelope(self, periods: Sequence[Sequence[float]]) -> tuple[float, ...]:
        return tuple(map(max, zip(*periods, strict=True))) if len(periods) > 1 else tuple(periods[0])


def _peak(blocks: Sequence[float], begin: float, end: float) -> float:
    """The most around the stretch between two places, in blocks from now."""
    first, last = math.floor(begin) - 1, math.floor(end) + 1
    return max(blocks[i % len(blocks)] for i in range(first, last + 1))


def find_season(series: Series) -> Season | None:
    """The shortest period by which the series repeats itself, if it does.

    By phase dispersion minimisation (Stellingwerf 1978) over all periods that the series has: of
    the variance, the part within phases is to be small against the whole; of both is taken what the
    random portions do.
    """
    num = int(series.seconds[-1] / BLOCK_S)
    blocks = _Blocks.last(series, num, BLOCK_S)
    lags = range(MIN_BLOCKS, num // 2 + 1)
    if not lags:
        return None
    shares = [max(blocks.unexplained(lag), MAX_UNEXPLAINED / 2) for lag in lags]
    if min(shares) > 2 * MAX_UNEXPLAINED:
        return None
    best = lags[shares.index(min(shares))]
    # Blocks are a little more or less than BLOCK_S wide, so that they fill a period.
    fits = []
    for shift_s in range(-10, 11, 2):
        width_s = BLOCK_S + shift_s / best
        num_periods = min(MAX_PERIODS, int(series.seconds[-1] / width_s / best))
        if num_periods > 1:
            fits.append(_Blocks.last(series, num_periods * best, width_s))
    fit = min(fits, key=lambda each: each.unexplained(best))
    if fit.unexplained(best) > MAX_UNEXPLAINED:
        return None
    loads = tuple(each / fit.width_s for each in fit.amounts)
    return Season(
        period_s=best * fit.width_s,
        periods=tuple(
            loads[end - best : end] for end in range(len(loads), 0, -best)
        ),
    )


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
        return (within - noise * (1 - 1 / periods)) / total* periods / (periods - 1)


def _at(series: Series, sums: Sequence[float], time_s: float) -> float:
    """A sum at a time within a bucket, as if it had come evenly."""
    place = min(max(1, bisect_left(series.seconds, time_s)), series.size)
    begin_s, end_s = series.seconds[place - 1], series.seconds[place]
    part = (time_s - begin_s) / (end_s - begin_s)
    return sums[place - 1] + part * (sums[place] - sums[place - 1])
