"""Load that comes back: whether the last periods were alike, and what they say is next. Pure.

Two periods that are alike are enough: who has seen two bursts, five minutes apart, expects a third.
"""

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

MAX_UNEXPLAINED = 0.2
"""Of the variance, the part that may lie within phases; that of unrelated periods is about 1."""

MAX_UNEXPLAINED_BY_TWO = 0.05
"""The same where there are but two periods: any two humps are alike to some degree."""

MIN_VARIATION = 0.2
"""Standard deviation of the load over its mean: with less, there is nothing to foretell."""

LENGTH_PENALTY = 0.2
"""On a period as long as the series, in what it may leave unexplained."""

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
        predicted = _most(self.periods[1:], -1 - int(within_s / self.block_s), -1)
        return exceeds(series, predicted, within_s)

    def predicted(self, series: Series) -> tuple[float, ...]:
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
    """The period by which the series repeats itself best, if it does.

    By phase dispersion minimisation (Stellingwerf 1978) over the last two to `MAX_PERIODS` periods.
    """
    block_s = look_back_s / BLOCKS
    num = int(series.seconds[-1] / block_s)
    if num < 2 * MIN_BLOCKS or series.amounts[-1] == 0:
        return None
    noise_per_s = series.squares[-1] / series.seconds[-1]
    amounts = _blocks(series, num, block_s)

    def misfit(size: int) -> float:
        # Of a period and its double, which fit alike, the period.
        return _unexplained(amounts, size, noise_per_s * block_s) + LENGTH_PENALTY * size / num

    size = min(range(MIN_BLOCKS, num // 2 + 1), key=misfit)
    if misfit(size) >= 1.0:
        return None
    # Whole blocks are a rough measure of a period: it may be up to one shorter or longer.
    unexplained, width_s, fit = min(
        (_unexplained(fit, size, noise_per_s * width_s), width_s, fit)
        for width_s in (block_s * (1 + part / 5 / size) for part in range(-5, 6))
        if (num_periods := int(series.seconds[-1] / width_s / size)) > 1
        for fit in (_blocks(series, size * min(MAX_PERIODS, num_periods), width_s),)
    )
    if unexplained > (MAX_UNEXPLAINED if len(fit) > 2 * size else MAX_UNEXPLAINED_BY_TWO):
        return None
    loads = tuple(each / width_s for each in fit)
    return Season(
        block_s=width_s,
        periods=tuple(loads[end - size : end] for end in range(len(loads), 0, -size)),
    )


def _unexplained(amounts: Sequence[float], size: int, noise: float) -> float:
    """The variance within phases of periods of `size` blocks, over all variance, both less the
    `noise` in a block's; 1 where there is little else."""
    num = min(MAX_PERIODS, len(amounts) // size)
    amounts = amounts[-num * size :]
    mean = sum(amounts) / len(amounts)
    mean_square = sum(each * each for each in amounts) / len(amounts)
    variance = mean_square - mean**2 - noise
    if variance <= max(MIN_SIGNAL * noise, (MIN_VARIATION * mean) ** 2):
        return 1.0
    shared = sum(sum(amounts[i::size]) ** 2 for i in range(size)) / num / len(amounts)
    # A phase's mean is of its own amounts: their variance is larger by what that takes off.
    return ((mean_square - shared) * num / (num - 1) - noise) / variance


def _blocks(series: Series, num: int, block_s: float) -> tuple[float, ...]:
    """The amounts of the last `num` blocks, as if what came in a bucket had come evenly."""
    sums, place = [], series.size
    for i in range(num + 1):
        end_s = max(0.0, series.seconds[-1] - i * block_s)
        while place > 1 and series.seconds[place - 1] >= end_s:
            place -= 1
        begin_s = series.seconds[place - 1]
        part = (end_s - begin_s) / (series.seconds[place] - begin_s)
        before = series.amounts[place - 1]
        sums.append(before + part * (series.amounts[place] - before))
    return tuple(after - before for after, before in pairwise(sums))[::-1]
