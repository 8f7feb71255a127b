"""What becomes of a request whose engine is gone: pure functions of what has happened to it.

Engines go on exactly where the last one was, so a request that makes engines fail, by ending them
or by hanging them, does so at the same place of its answer each time. Engines fail often and such
requests are rare: after one failure all that the engine had goes on at once, in whatever replicas
have room. Those that two failures have in common are suspects: each goes on in a replica that has
no other suspect (`router.quarantine`), so that a third failure tells which of them it is. A request
that makes engines end at another place each time is known by having been the only one in three of
them, one that hangs them so by how many there were.

Machines that are paused, or swap, hang engines too, and not one alone. A request is in one engine
at a time, and it takes a stall timeout to see that this hangs: two that are seen to hang within
less time than that were not hung by one request.
"""

from collections.abc import Iterable
from dataclasses import dataclass

IN_FLIGHT_TOKENS = 8
"""How many tokens an engine may have been ahead of what the router had of it when it failed. Covers
two steps, each with a few speculated tokens."""

SUSPECT_AFTER = 2
REFUSED_AFTER = 3
"""Engines that have failed with a request."""
MOST_HANGS = 10
"""Engines and replicas that may hang with a request in all, wherever in its answer. Many, as
machines and networks hang too: hardly anybody is beside the cause that often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryLimits:
    """How far a router goes for a request before it gives it up."""

    max_moves: int
    """Moves to another engine that one request is worth."""
    max_wait_s: float
    """Seconds that a request waits for a pool without a live replica."""
    stall_timeout_s: float
    """Seconds without a sign of life after which an engine or a replica is seen to hang."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hang:
    """An engine that did not answer, or a replica of which nothing was heard."""

    replica_id: str
    at_s: float
    """When that was seen, of the monotonic clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """Engines that have failed with a request and that it has not been cleared of."""

    num_ended: int
    hangs: tuple[Hang, ...] = ()
    num_excused: int = 0
    """Of the hangs, those that it cannot have caused, as far as is known at the last failure."""
    num_tokens: int
    """Output tokens that the request had at the last of them, from whatever engine."""
    was_prefilling: bool
    """Whether that one computed its prompt for another engine, which was to decode."""

    @property
    def num(self) -> int:
        """Those that it may have caused."""
        return self.num_ended + len(self.hangs) - self.num_excused

    @property
    def makes_suspect(self) -> bool:
        return self.num >= SUSPECT_AFTER

    def clears(self, num_tokens: int) -> bool:
        """Whether a request with `num_tokens` output tokens cannot have caused them.

        It has passed the place where the last one failed, in an engine that is still there.
        """
        in_flight = 0 if self.was_prefilling else IN_FLIGHT_TOKENS
        return num_tokens > self.num_tokens + in_flight


@dataclass(frozen=True, slots=True, kw_only=True)
class MovePlan:
    """Whether a request goes on elsewhere, and why not."""

    moves: bool
    reason: str


def one_more(
    before: Failures | None,
    *,
    num_tokens: int,
    was_prefilling: bool,
    hang: Hang | None = None,
    all_hangs: Iterable[Hang] = (),
    stall_timeout_s: float = 0.0,
) -> Failures:
    """An engine has failed with a request that has `num_tokens` output tokens.

    Args:
        hang: of the engine, where it has not ended.
        all_hangs: that the router has seen lately, this one among them.
        stall_timeout_s: as in `RecoveryLimits`.
    """
    hangs = (*(before.hangs if before is not None else ()), *((hang,) if hang is not None else ()))
    seen = tuple(all_hangs)
    return Failures(
        num_ended=(before.num_ended if before is not None else 0) + (hang is None),
        hangs=hangs,
        num_excused=sum(_is_one_of_several(each, seen, stall_timeout_s) for each in hangs),
        num_tokens=num_tokens,
        was_prefilling=was_prefilling,
    )


def _is_one_of_several(hang: Hang, seen: Iterable[Hang], stall_timeout_s: float) -> bool:
    return any(
        other.replica_id != hang.replica_id and abs(other.at_s - hang.at_s) < stall_timeout_s
        for other in seen
    )


def plan_move(
    *,
    num_moves: int,
    failures: Failures | None,
    num_alone: int,
    num_hangs: int,
    limits: RecoveryLimits,
) -> MovePlan:
    """Whether a request that has lost its engine gets another.

    Args:
        num_moves: moves before this one.
        failures: with the one that it has just lost, if that has failed; engines that drain or were
            stopped have not, nor has one whose connection was lost.
        num_alone: engines that have ever ended with this request and no other in them.
        num_hangs: engines and replicas that have ever hung with this request.
    """
    if num_alone >= REFUSED_AFTER:
        return MovePlan(moves=False, reason=f"{num_alone} engines failed that had nothing else")
    if failures is not None and failures.num >= REFUSED_AFTER:
        return MovePlan(moves=False, reason=f"{failures.num} engines failed at the same place")
    if num_hangs >= MOST_HANGS:
        return MovePlan(moves=False, reason=f"{num_hangs} engines hung with it")
    if num_moves >= limits.max_moves:
        return MovePlan(moves=False, reason=f"it was moved {num_moves} times already")
    return MovePlan(moves=True, reason="its engine is gone")
