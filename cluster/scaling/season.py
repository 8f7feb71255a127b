"""Load that comes back: whether the last periods were alike, and what they say is next. Pure.

Two periods that are alike are enough: who has seen two bursts, five minutes apart, expects a third.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from cluster.scaling.forecast import Series, exceeds

BLOCKS = 60
"""Of a look-back, in which periods are compared: what comes back may be one early or late."""

MIN_BLOCKS = 6
"""Of a period."""

MAX_PERIODS = 4
"""That are compared."""

MAX_UNEXPLAINED = 0.3
"""Of the variance that what just came may have within phases, against all of it; unrelated periods
have about 1."""

MIN_VARIATION = 0.2
"""Standard deviation of the load over its mean: with less, there is nothing to foretell."""

MIN_SIGNAL = 2.0
"""Variance of the load over that of its noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Season:
    """The periods that were alike."""

    block_s: float
    periods: tuple[tuple[float, ...], ...]
    """Amounts per second of each period's blocks, oldest first; the latest period first. It ends
    now, so what its first block was, the next will be."""

    @property
    def period_s(self) -> float:
        return self.block_s * len(self.periods[0])

    def peak(self, until_s: float) -> float:
        """The most that any period says of the time from now until `until_s` from now."""
        return _most(self.periods, 0, int(until_s / self.block_s))

    def is_surprised(self, series: Series, within_s: float) -> bool:
        """Whether for certain more came within the last `within_s` than periods before said."""
        foretold = _most(self.periods[1:], -1 - int(within_s / self.block_s), -1)
        return exceeds(series, foretold, within_s)

    def foretold(self, series: Series) -> tuple[float, ...]:
        """Of each bucket, the most that the other periods say."""
        ages = [int((series.seconds[-1] - end_s) / self.block_s) for end_s in series.seconds[1:]]
        says = {age: self._others_say(age) for age in set(ages)}
        return tuple(says[age] for age in ages)

    def _others_say(self, age: int) -> float:
        own = age // len(self.periods[0])
        others = [each for i, each in enumerate(self.periods) if i != own]
        return _most(others, -1 - age, -1 - age)


def _most(periods: Sequence[Sequence[float]], first: int, last: int) -> float:
    """The most from block `first` to `last`, counted from now: 0 is next, -1 was last."""
    return max(each[i % len(each)] for each in periods for i in range(first - 1, last + 2))


def find_season(series: Series, look_back_s: float) -> Season | None:
    """The shortest period by which the series repeats itself well, if it does.

    By phase dispersion minimisation (Stellingwerf 1978) over the last two to `MAX_PERIODS` periods.
    """
    block_s = look_back_s / BLOCKS
    num = int(series.seconds[-1] / block_s)
    if num < 2 * MIN_BLOCKS:
        return None
    blocks = _blocks(series, num, block_s)
    size = min(
        range(MIN_BLOCKS, num // 2 + 1),
        key=lambda size: max(blocks.unexplained(size), MAX_UNEXPLAINED / 2),
    )
    if blocks.unexplained(size) > 2 * MAX_UNEXPLAINED:
        return None
    # Whole blocks are a rough measure of a period: so it may be up to one shorter or longer.
    fits = [
        _blocks(series, size * min(MAX_PERIODS, num_periods), width_s)
        for width_s in (block_s * (1 + part / 5 / size) for part in range(-5, 6))
        if (num_periods := int(series.seconds[-1] / width_s / size)) > 1
    ]
    fit = min(fits, key=lambda each: each.unexplained(size))
    if fit.unexplained(size) > MAX_UNEXPLAINED:
        return None
    loads = tuple(each / fit.block_s for each in fit.amounts)
    return Season(
        block_s=fit.block_s,
        periods=tuple(loads[end - size : end] for end in range(len(loads), 0, -size)),
    )


@dataclass(frozen=True, slots=True)
class _Blocks:
    """The end of a series, oldest block first."""

    block_s: float
    amounts: tuple[float, ...]
    squares: tuple[float, ...]

    def unexplained(self, size: int) -> float:
        """The variance within phases of periods of `size` blocks, over all variance, noise taken
        off; 1 where there is little else."""
        num = min(MAX_PERIODS, len(self.amounts) // size)
        amounts = self.amounts[-num * size :]
        noise = sum(self.squares[-num * size :])
        mean = sum(amounts) / len(amounts)
        squares = sum(each * each for each in amounts)
        total = squares - len(amounts) * mean**2 - noise
        if total <= max(MIN_SIGNAL * noise, len(amounts) * (MIN_VARIATION * mean) ** 2):
            return 1.0
        within = squares - sum(sum(amounts[i::size]) ** 2 for i in range(size)) / num
        # A phase's mean is of its own amounts: their variance is larger by what that takes off.
        return (within * num / (num - 1) - noise) / total


def _blocks(series: Series, num: int, block_s: float) -> _Blocks:
    ends_s = [max(0.0, series.seconds[-1] - i * block_s) for i in range(num, -1, -1)]
    amounts = (_sum_at(end_s, series, series.amounts) for end_s in ends_s)
    squares = (_sum_at(end_s, series, series.squares) for end_s in ends_s)
    return _Blocks(
        block_s,
        tuple(after - before for before, after in pairwise(amounts)),
        tuple(after - before for before, after in pairwise(squares)),
    )


def _sum_at(time_s: float, series: Series, sums: Sequence[float]) -> float:
    """As if what came in a bucket had come evenly."""
    place = min(max(1, bisect_left(series.seconds, time_s)), series.size)
    begin_s, end_s = series.seconds[place - 1], series.seconds[place]
    part = (time_s - begin_s) / (end_s - begin_s)
    return sums[place - 1] + part * (sums[place] - sums[place - 1])
