"""What traffic will bring when a replica started now is ready: level, trend, and steps. Pure.

Works on a series of amounts that come in random portions: requests, or engine seconds of prompts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import fmean

from cluster.scaling.snapshot import Traffic

SIGNIFICANCE = 3.0
"""Standard errors by which a rise must stand out of noise to be believed at once, and by which a
straight line must miss what came last to be dropped: of the windows there are, one soon does by
less, and what is expected then follows the noise of the shorter ones."""

TREND_SIGNIFICANCE = 2.0
"""The same for a trend, whose part above it counts."""

MAX_GROWTH = 2.0
"""By a trend, until a replica that is started now is ready."""

MIN_BLOCKS = 8
"""Of earlier traffic, to tell how much amounts vary."""


@dataclass(frozen=True, slots=True)
class Series:
    """Sums from the start of the history up to each bucket's end; a 0 first."""

    seconds: tuple[float, ...]
    amounts: tuple[float, ...]
    squares: tuple[float, ...]
    """Of each portion: the variance of a sum of a Poisson number of portions."""

    @property
    def loads(self) -> list[tuple[float, float]]:
        """Each bucket's seconds, and its amount per second."""
        return [
            (end_s - begin_s, (after - before) / (end_s - begin_s))
            for (begin_s, end_s), (before, after) in zip(
                pairwise(self.seconds), pairwise(self.amounts), strict=True
            )
        ]

    @property
    def size(self) -> int:
        return len(self.amounts) - 1


def requests(history: Sequence[Traffic]) -> Series:
    """Portions of one request each."""
    return _series(history, lambda each: each.num_arrivals, lambda each: each.num_arrivals)


def prefill_work(history: Sequence[Traffic]) -> Series:
    """Portions of a prompt's engine seconds: prompts that get longer are seen as more requests."""
    return _series(history, lambda each: each.prefill_s, lambda each: each.prefill_squared_s2)


def _series(
    history: Sequence[Traffic],
    amount: Callable[[Traffic], float],
    square: Callable[[Traffic], float],
) -> Series:
    return Series(
        tuple(accumulate((each.duration_s for each in history), initial=0.0)),
        tuple(accumulate(map(amount, history), initial=0.0)),
        tuple(accumulate(map(square, history), initial=0.0)),
    )


def expect(series: Series, ahead_s: float) -> float:
    """Amount per second `ahead_s` from now: what is certain at least, or where its line leads.

    0 before anything came.
    """
    windows = _windows(series)
    if not windows or series.amounts[-1] == 0:
        return 0.0
    # What is older than a start ago has been, and may be over.
    young = [each for each, _ in windows[1:] if _over(series, each)[2] <= ahead_s]
    certain = max(_certain(series, each) for each in (windows[0][0], *young))
    return max(certain, _line(series, windows, ahead_s))


def exceeds(series: Series, load: float, within_s: float) -> bool:
    """Whether more than `load` came for certain in the last 2, 4, 8, ... buckets of `within_s`."""
    sizes = (2**i for i in range(1, series.size.bit_length()))
    young = (each for each in sizes if _over(series, each)[2] <= within_s)
    return any(_certain(series, each) > load for each in young)


def _windows(series: Series) -> list[tuple[int, float]]:
    """The last 2, 4, 8, ... buckets, each with its dispersion: how many times more sums over as
    many buckets vary than Poisson arrivals would make them."""
    windows, size, dispersion, end = [], 2, 1.0, series.size
    while end and size // 2 < end:
        window = min(size, end)
        blocks = [(i - window, i) for i in range(end - window, window - 1, -window)]
        squares = sum(series.squares[b] - series.squares[a] for a, b in blocks)
        if len(blocks) >= MIN_BLOCKS and squares > 0:
            sums = [series.amounts[b] - series.amounts[a] for a, b in blocks]
            dispersion = max(dispersion, _variance(sums) / (squares / len(blocks)))
        windows.append((window, dispersion))
        size *= 2
    return windows


def _certain(series: Series, window: int) -> float:
    """The lower confidence bound of the rate over a window: a step is seen at once, noise is not.

    Noise is that of Poisson arrivals: where traffic comes in bursts, each is a rise to be met.
    """
    amount, square, seconds = _over(series, window)
    return (amount - SIGNIFICANCE * math.sqrt(square)) / seconds


def _line(series: Series, windows: Sequence[tuple[int, float]], ahead_s: float) -> float:
    """Where the straight line through the longest window that is one leads, least squares.

    A window is one while its line explains all shorter ones, the latest amounts, within noise. No
    line leads further than it has been seen to: a step is steep, and over soon. Of the slope counts
    what stands out of noise (a positive-part shrinkage, James and Stein 1961).
    """
    best = 0.0
    for place, (window, dispersion) in enumerate(windows):
        amount, square, seconds = _over(series, window)
        mean = amount / seconds
        slope = _slope(series, window) if seconds >= ahead_s else 0.0
        if slope and _is_step(series, window, slope):
            slope = 0.0
        for shorter, its_dispersion in windows[:place]:
            came, squares, over_s = _over(series, shorter)
            explained = (mean + slope * (seconds - over_s) / 2) * over_s
            # Of two windows that share what came last, the rest is what differs.
            noise = math.sqrt(its_dispersion * max(squares, square * over_s / seconds))
            if abs(came - explained) > SIGNIFICANCE * noise:
                return best
        error = math.sqrt(12 * dispersion * square) / seconds**2
        believed = 0.0
        if slope:
            believed = slope * max(0.0, 1 - (TREND_SIGNIFICANCE * error / slope) ** 2)
        level = max(0.0, mean + believed * seconds / 2)
        best = min(MAX_GROWTH * level, max(0.0, level + believed * ahead_s))
    return best


def _is_step(series: Series, window: int, slope: float) -> bool:
    """Whether one step explains the amounts of a window better than its line does, by more than the
    place that a step may choose gains by chance."""
    start = series.size - window
    seconds = [each - series.seconds[start] for each in series.seconds[start:]]
    amounts = [each - series.amounts[start] for each in series.amounts[start:]]
    whole_s, mean = seconds[-1], amounts[-1] / seconds[-1]
    # What each takes off the squared differences from the mean.
    by_line = slope**2 * whole_s**3 / 12
    by_step = max(
        (after - mean * after_s) ** 2 * whole_s / (after_s * (whole_s - after_s))
        for after_s, after in zip(seconds[1:-1], amounts[1:-1], strict=True)
    )
    noise = _over(series, window)[1] / whole_s
    return by_step - by_line > TREND_SIGNIFICANCE**2 * noise


def _slope(series: Series, window: int) -> float:
    """Of the rate, per second, by least squares over equal weights."""
    start = series.size - window
    seconds = series.seconds[-1] - series.seconds[start]
    middle = series.seconds[start] + seconds / 2
    moment = sum(
        (series.amounts[i + 1] - series.amounts[i])
        * ((series.seconds[i] + series.seconds[i + 1]) / 2 - middle)
        for i in range(start, series.size)
    )
    return 12 * moment / seconds**3


def _over(series: Series, window: int) -> tuple[float, float, float]:
    """Amount, squares and seconds of the last `window` buckets."""
    start = series.size - window
    return (
        series.amounts[-1] - series.amounts[start],
        series.squares[-1] - series.squares[start],
        series.seconds[-1] - series.seconds[start],
    )


def _variance(sums: Sequence[float]) -> float:
    """From successive differences, so that a trend does not pass for noise (von Neumann et al., The
    Mean Square Successive Difference, 1941); without the two largest, so that a step, which falls
    between two sums or within one, does not either."""
    squares = sorted((after - before) ** 2 for before, after in pairwise(sums))
    return fmean(squares[:-2]) / 2
