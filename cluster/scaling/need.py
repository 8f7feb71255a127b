"""What one pool needs by its own phase's model, before limits, budget and delays. Pure."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    replicas: int
    """The fewest that are predicted to hold the target; the pool grows to it."""
    reason: str
    enough: int
    """The fewest that hold it with a margin; the pool shrinks to it."""
    attainable: float
    """The share of requests that can meet the target at all, with any number of replicas."""
    is_behind: bool
    """Whether more is waiting than the ready replicas do in time: a rise that is being worked off,
    whose misses say nothing about the prediction."""
    is_ample: bool
    """Whether the ready replicas would hold the target even if all took `CORRECTION_MAX` times as
    long as predicted: what they miss, they do not miss for want of replicas."""
    forecast: float
    """The load that is expected when a replica that is started now is ready."""
    is_predicted: bool
    """Whether that is known from a season: less needs not have been enough for a while."""
    inputs: tuple[tuple[str, float], ...]


CORRECTION_MAX = 2.0
"""By which measured work may be taken to exceed predicted work."""

MARGIN = 1.05
"""On the load that a smaller pool must hold: the other bar of the hysteresis."""


def min_replicas_for(
    share_of: Callable[[int], float], wanted: float, *, most: int, around: int
) -> int:
    """The smallest n in [0, `most`] whose share reaches `wanted`; `most` + 1 if none does.

    More must never do worse. Looks next to `around` first: the answer rarely moves far.
    """
    n, stride = min(most, max(0, around)), 1
    if share_of(n) >= wanted:
        high = n
        while n > 0 and share_of(n := max(0, n - stride)) >= wanted:
            high, stride = n, 2 * stride
        low = n
    else:
        low = n
        while n < most and share_of(n := min(most, n + stride)) < wanted:
            low, stride = n, 2 * stride
        high = n if share_of(n) >= wanted else most + 1
        low = min(low, high)
    return bisect_left(range(high), wanted, lo=low, key=share_of)


def stricter(share: float) -> float:
    """The share of requests with half the misses."""
    return (1 + share) / 2


def largest(candidates: tuple[tuple[int, str], ...]) -> tuple[int, str]:
    """The largest need and its reason; the first of equals."""
    return max(candidates, key=lambda candidate: candidate[0])
