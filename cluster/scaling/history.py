"""What the recent traffic was: means, the demand over a stretch of time, and its trend. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import fmean

from cluster.scaling.snapshot import Traffic

PRIOR_OUTPUT_TOKENS = 128.0
"""Of an answer, until one has ended."""

TREND_SIGNIFICANCE = 3.0
"""Standard errors by which a trend or a rise must stand out of noise to be believed."""

RECENT_S = 30.0
"""At least; otherwise two starts: over which the present demand is measured."""

MIN_BLOCKS = 8
"""Of earlier traffic, to tell how much counts vary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What arrives per second, and what an average request is."""

    rate: float
    """Requests per second."""
    prefill_s: float
    """Predicted engine seconds of a prompt, mean."""
    prefill_variation: float
    """Squared coefficient of variation of the same."""
    prompt_tokens: float
    output_tokens: float

    @property
    def context_tokens(self) -> float:
        """That a request holds in decode, averaged over its answer."""
        return self.prompt_tokens + self.output_tokens / 2


def measure_demand(history: Sequence[Traffic], *, output_tokens: float | None) -> Demand:
    """The mean demand over `history`. All zero but the output where nothing arrived."""
    duration_s = math.fsum(each.duration_s for each in history)
    arrivals = sum(each.num_arrivals for each in history)
    output = PRIOR_OUTPUT_TOKENS if output_tokens is None else max(1.0, output_tokens)
    if arrivals == 0 or duration_s == 0:
        return Demand(
            rate=0.0, prefill_s=0.0, prefill_variation=0.0, prompt_tokens=0.0, output_tokens=output
        )
    mean_s = math.fsum(each.prefill_s for each in history) / arrivals
    square_s2 = math.fsum(each.prefill_squared_s2 for each in history) / arrivals
    return Demand(
        rate=arrivals / duration_s,
        prefill_s=mean_s,
        prefill_variation=max(0.0, square_s2 / mean_s**2 - 1.0) if mean_s else 0.0,
        prompt_tokens=sum(each.num_prompt_tokens for each in history) / arrivals,
        output_tokens=output,
    )


def latest(history: Sequence[Traffic], seconds: float) -> tuple[Traffic, ...]:
    """The end of `history`: as little as covers `seconds`, or all of it."""
    covered_s, start = 0.0, len(history)
    while start > 0 and covered_s < seconds:
        start -= 1
        covered_s += history[start].duration_s
    return tuple(history[start:])


def certain_rate(history: Sequence[Traffic]) -> float:
    """The arrival rate that the last seconds prove: a step is seen at once, noise is not.

    The largest lower confidence bound of the rate over the last 2, 4, 8, ... buckets. The variance
    of a count is its mean times the index of dispersion of earlier counts over as many buckets: 1
    for Poisson arrivals, so that two seconds of a doubled load tell; tens where traffic always
    comes in bursts, so that one more burst does not.
    """
    counts: list[int] = [0, *accumulate(each.num_arrivals for each in history)]
    seconds = [0.0, *accumulate(each.duration_s for each in history)]
    best, size, dispersion, end = 0.0, 2, 1.0, len(history)
    while end and size // 2 < end:
        window = min(size, end)
        arrivals = counts[end] - counts[end - window]
        earlier: list[int] = [
            counts[i] - counts[i - window] for i in range(end - window, window - 1, -window)
        ]
        if len(earlier) >= MIN_BLOCKS and any(earlier):
            dispersion = max(dispersion, _variance(earlier) / fmean(earlier))
        error = TREND_SIGNIFICANCE * math.sqrt(dispersion * arrivals)
        best = max(best, (arrivals - error) / (seconds[end] - seconds[end - window]))
        size *= 2
    return best


def recent_rate(history: Sequence[Traffic]) -> float:
    """The mean rate of the last seconds, noise and all: what a pool that shrinks has to expect."""
    return measure_demand(latest(history, RECENT_S), output_tokens=None).rate


def _variance(counts: Sequence[int]) -> float:
    """From successive differences, so that a trend or one step does not pass for noise (von
    Neumann et al., The Mean Square Successive Difference, 1941)."""
    return fmean((after - before) ** 2 for before, after in pairwise(counts)) / 2


def forecast_growth(history: Sequence[Traffic], ahead_s: float) -> float:
    """The factor by which the rate grows within `ahead_s`, at least 1 and at most 2.

    From the halves of `history`: their difference is a trend where it is more than noise explains.
    Half the window later the rate will have grown by as much again.
    """
    half = len(history) // 2
    if half == 0:
        return 1.0
    older, newer = history[:half], history[-half:]
    before, after = (sum(each.num_arrivals for each in part) for part in (older, newer))
    if after - before <= TREND_SIGNIFICANCE * math.sqrt(after + before):
        return 1.0
    half_s = math.fsum(each.duration_s for each in newer)
    # Both counts are centred a quarter of the window from its middle.
    growth_per_s = (after - before) / after / half_s
    return min(2.0, 1.0 + growth_per_s * (ahead_s + half_s / 2))
