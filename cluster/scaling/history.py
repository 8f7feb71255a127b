"""What the recent traffic was: the demand over a stretch of time. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from cluster.scaling.snapshot import Traffic

PRIOR_OUTPUT_TOKENS = 128.0
"""Of an answer, until one has ended."""

RECENT_S = 30.0
"""Over which a rate is measured that is likely to stay."""

MIN_SAMPLES = 30
"""Lengths whose mean tells something."""

SHIFT_SIGNIFICANCE = 3.0
"""Standard errors by which the latest lengths must differ from those before to have shifted."""


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


def unshifted(history: Sequence[Traffic]) -> tuple[Traffic, ...]:
    """The end of `history` that has prompts like the latest: of its last 1, 2, 4, ... buckets as
    many as have a mean that those of all fewer buckets agree with, within noise."""
    nums = tuple(accumulate((each.num_arrivals for each in history), initial=0))
    sums = tuple(accumulate((each.prefill_s for each in history), initial=0.0))
    squares = tuple(accumulate((each.prefill_squared_s2 for each in history), initial=0.0))
    fewer: list[tuple[int, float]] = []
    end, size, found = len(history), 1, len(history)
    while end and size < 2 * end:
        start = max(0, end - size)
        num = nums[-1] - nums[start]
        if num >= MIN_SAMPLES:
            mean = (sums[-1] - sums[start]) / num
            variance = max(0.0, (squares[-1] - squares[start]) / num - mean**2)
            if any(
                abs(each - mean) > SHIFT_SIGNIFICANCE * math.sqrt(variance / of)
                for of, each in fewer
            ):
                break
            fewer.append((num, mean))
            found = end - start
        size *= 2
    return tuple(history[end - found :])
