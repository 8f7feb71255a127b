"""Routing policies: pure functions from a snapshot of one pool to a replica, with the reason.

A policy compares when the request would be done: the predicted work that is ahead of it, and what
it costs itself, which is less where a part of it is cached. Ties break by replica id.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLoad:
    """One replica as this router sees it."""

    replica_id: str
    work_s: float
    """Predicted seconds ahead of a new request. In prefill: of all that waits or runs there. In
    decode: what the requests that are there add to each step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixHit:
    """A replica that has a part of the request's prompt in its cache."""

    load: ReplicaLoad
    num_cached_tokens: int
    request_s: float
    """Predicted seconds of the request there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSnapshot:
    """What a policy decides on."""

    replicas: tuple[ReplicaLoad, ...]
    """At least one."""
    turn: int = 0
    """How many requests this router has routed in this pool."""
    num_routers: int = 1
    """That route to these replicas."""
    request_s: float = 0.0
    """Predicted seconds of the request where nothing of it is cached."""
    hits: tuple[PrefixHit, ...] = ()
    """Of those replicas, the ones with a part of the prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutePlan:
    """Where a request goes, and what it is predicted to be there."""

    replica_id: str
    reason: str
    wait_s: float = 0.0
    """Work ahead of it."""
    request_s: float = 0.0
    """Its own: what its line in the ledger says."""
    num_cached_tokens: int = 0

    @property
    def finish_s(self) -> float:
        return self.wait_s + self.request_s


class Rng(Protocol):
    """As much of `random.Random` as the policies need."""

    def sample(self, population: Sequence[ReplicaLoad], k: int) -> list[ReplicaLoad]: ...


class Policy(Protocol):
    def __call__(self, snapshot: PoolSnapshot, rng: Rng) -> RoutePlan: ...


def num_candidates(*, num_routers: int, num_replicas: int) -> int:
    """How many replicas, picked at random, a router compares.

    One router knows all that was sent and does best to compare all. Of several, each knows only its
    own and what the others had sent a while ago: comparing all they would go to the same replica.
    """
    if num_routers <= 1:
        return num_replicas
    return min(num_replicas, max(2, -(-num_replicas // num_routers)))


def pick_p2c(snapshot: PoolSnapshot, rng: Rng) -> RoutePlan:
    """The first to be done of some picked at random and of those that know the prompt.

    Power of two choices (Mitzenmacher, TPDS 2001), with more choices where few routers run.
    """
    replicas = snapshot.replicas
    num = num_candidates(num_routers=snapshot.num_routers, num_replicas=len(replicas))
    if num == len(replicas):
        return _first_done(replicas, snapshot, "least work of all")
    return _first_done(rng.sample(replicas, num), snapshot, f"least work of {num}")


def pick_least_work(snapshot: PoolSnapshot, rng: Rng) -> RoutePlan:
    """The first to be done of all; several routers herd on whichever looks idle."""
    return _first_done(snapshot.replicas, snapshot, "least work of all")


def pick_round_robin(snapshot: PoolSnapshot, rng: Rng) -> RoutePlan:
    """Each in turn, by id."""
    ordered = sorted(snapshot.replicas, key=lambda replica: replica.replica_id)
    return _plan(ordered[snapshot.turn % len(ordered)], snapshot, "its turn")


def pick_random(snapshot: PoolSnapshot, rng: Rng) -> RoutePlan:
    return _plan(rng.sample(snapshot.replicas, 1)[0], snapshot, "random")


def _first_done(replicas: Sequence[ReplicaLoad], snapshot: PoolSnapshot, reason: str) -> RoutePlan:
    """Of `replicas` and of those with a part of the prompt, the one that is first done with it."""
    least = min(replicas, key=lambda replica: (replica.work_s, replica.replica_id))
    if not snapshot.hits:
        return _plan(least, snapshot, reason)
    hit = min(
        snapshot.hits,
        key=lambda hit: (hit.load.work_s + hit.request_s, hit.load.replica_id),
    )
    if hit.load.work_s + hit.request_s <= least.work_s + snapshot.request_s:
        return _plan(hit.load, snapshot, "prefix is cached there")
    return _plan(least, snapshot, reason)


def _plan(load: ReplicaLoad, snapshot: PoolSnapshot, reason: str) -> RoutePlan:
    hits = {hit.load.replica_id: hit for hit in snapshot.hits}
    hit = hits.get(load.replica_id)
    return RoutePlan(
        replica_id=load.replica_id,
        reason=reason,
        wait_s=load.work_s,
        request_s=hit.request_s if hit else snapshot.request_s,
        num_cached_tokens=hit.num_cached_tokens if hit else 0,
    )


POLICIES: dict[str, Policy] = {
    "p2c": pick_p2c,
    "least_work": pick_least_work,
    "round_robin": pick_round_robin,
    "random": pick_random,
}
