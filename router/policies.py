"""Routing policies: pure functions from a snapshot of one pool to a replica, with the reason.

A policy sees predicted seconds of outstanding work: what this router sent and has not seen end,
and what the replica says others sent. Ties break by replica id.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLoad:
    replica_id: str
    work_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSnapshot:
    replicas: tuple[ReplicaLoad, ...]
    """At least one."""
    turn: int
    """How many requests this router has routed in this pool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutePlan:
    replica_id: str
    reason: str


class Rng(Protocol):
    """As much of `random.Random` as the policies need."""

    def sample(self, population: Sequence[ReplicaLoad], k: int) -> list[ReplicaLoad]: ...


class Policy(Protocol):
    def __call__(self, snapshot: PoolSnapshot, rng: Rng) -> RoutePlan: ...


def pick_p2c(snapshot: PoolSnapshot, rng: Rng) -> RoutePlan:
    """The less loaded of two picked at random (Mitzenmacher, TPDS 2001)."""
    picked = rng.sample(snapshot.replicas, min(2, len(snapshot.replicas)))
    return _least(picked, "less work of two")


def pick_least_work(snapshot: PoolSnapshot, rng: Rng) -> RoutePlan:
    """The least loaded of all; with several routers it herds on whichever looks idle."""
    return _least(snapshot.replicas, "least work of all")


def pick_round_robin(snapshot: PoolSnapshot, rng: Rng) -> RoutePlan:
    """Each in turn, by id."""
    ordered = sorted(snapshot.replicas, key=lambda replica: replica.replica_id)
    chosen = ordered[snapshot.turn % len(ordered)]
    return RoutePlan(replica_id=chosen.replica_id, reason="its turn")


def pick_random(snapshot: PoolSnapshot, rng: Rng) -> RoutePlan:
    return RoutePlan(replica_id=rng.sample(snapshot.replicas, 1)[0].replica_id, reason="random")


def _least(replicas: Sequence[ReplicaLoad], reason: str) -> RoutePlan:
    chosen = min(replicas, key=lambda replica: (replica.work_s, replica.replica_id))
    return RoutePlan(replica_id=chosen.replica_id, reason=reason)


POLICIES: dict[str, Policy] = {
    "p2c": pick_p2c,
    "least_work": pick_least_work,
    "round_robin": pick_round_robin,
    "random": pick_random,
}
