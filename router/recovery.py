"""What becomes of a request whose engine is gone: pure functions of what has happened to it.

Engines go on exactly where the last one was, so a request that kills engines kills the next one at
the same place of its answer, if it has not done so before: that tells it from one that was beside.
"""

from dataclasses import dataclass

IN_FLIGHT_TOKENS = 8
"""How many tokens an engine may have been ahead of what the router had of it when it died. Covers
two steps, each with a few speculated tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryLimits:
    """How far a router goes for a request before it gives it up."""

    max_moves: int
    """Moves to another engine that one request is worth."""
    max_wait_s: float
    """Seconds that a request waits for a pool without a live replica."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """The death of an engine, as seen by a request that was in it."""

    num_tokens: int
    """Output tokens that the request had by then, from whatever engine."""
    was_alone: bool
    """Whether the engine had no other request."""
    was_reading: bool
    """Whether the engine read its prompt for another that was to write the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MovePlan:
    """Whether a request goes on elsewhere, and why not."""

    moves: bool
    reason: str


def is_suspect(death: Death | None, num_tokens: int) -> bool:
    """Whether a request that has `num_tokens` output tokens now may have caused that death.

    It is cleared once another engine has taken it past the place where the first one died, or has
    read what the first one was reading (then the death is forgotten).
    """
    return death is not None and num_tokens <= death.num_tokens + IN_FLIGHT_TOKENS


def plan_move(
    *, num_moves: int, before: Death | None, death: Death | None, limits: RecoveryLimits
) -> MovePlan:
    """Whether a request that has lost its engine gets another.

    Args:
        num_moves: moves before this one.
        before: the last death of an engine with it, before this one.
        death: this one; None where the engine has not died but drains, hangs or was stopped.
    """
    # An engine that reads and one that writes seldom die of the same; a request that kills now one,
    # now the other is bounded by `max_moves`.
    if before is not None and death is not None and before.was_reading == death.was_reading:
        if is_suspect(before, death.num_tokens):
            return MovePlan(moves=False, reason="two engines died with it at the same place")
        if before.was_alone and death.was_alone:
            return MovePlan(moves=False, reason="two engines died that had nothing else")
    if num_moves >= limits.max_moves:
        return MovePlan(moves=False, reason=f"it was moved {num_moves} times already")
    return MovePlan(moves=True, reason="its engine is gone")
