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
    """The fewest that hold it with half the misses allowed; the pool shrinks to it."""
    inputs: tuple[tuple[str, float], ...]


def fewest(fits: Callable[[int], bool], most: int) -> int:
    """The smallest n from 0 to `most` that fits, `most` + 1 if none. More must never fit worse."""
    return bisect_left(range(most + 1), True, key=fits)


def stricter(share: float) -> float:
    """The share of requests with half the misses."""
    return (1 + share) / 2


def largest(candidates: tuple[tuple[int, str], ...]) -> tuple[int, str]:
    """The largest need and its reason; the first of equals."""
    return max(candidates, key=lambda candidate: candidate[0])
