"""What becomes of a request whose engine is gone: a pure function of what has happened to it."""

from dataclasses import dataclass

MAX_DEATHS = 2
"""A request is refused once this many engines in a row died before it had a token from them. After
the first such death it comes to an engine as the only one of its kind: the next is no accident.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryLimits:
    """How far a router goes for a request before it gives it up."""

    max_moves: int = 3
    """Moves to another engine that one request is worth."""
    max_wait_s: float = 120.0
    """Seconds that a request waits for a pool without a live replica."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MovePlan:
    """Whether a request goes on elsewhere, and why not."""

    moves: bool
    reason: str


def plan_move(*, num_moves: int, num_deaths: int, limits: RecoveryLimits) -> MovePlan:
    """Whether a request that has lost its engine gets another.

    Args:
        num_moves: moves before this one.
        num_deaths: engines in a row that died before it had a token, the last one included.
    """
    if num_deaths >= MAX_DEATHS:
        return MovePlan(moves=False, reason=f"{num_deaths} engines in a row died with it")
    if num_moves >= limits.max_moves:
        return MovePlan(moves=False, reason=f"it was moved {num_moves} times already")
    return MovePlan(moves=True, reason="its engine is gone")
