"""Routing policies: pure functions from a snapshot of one pool to a replica, with the reason.

A policy compares when the request would be done: the predicted work that is ahead of it, and what
it costs itself, which is less where a part of it is cached. Ties break by replica id.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

MAX_CANDIDATES = 64
"""Replicas that one of several routers compares for a request."""

FORGETTING_S = 2.0
"""What a report says of others' work counts 1/e after this long: simulated, 1 to 4 are alike."""


OTHERS_TOO = 2.0
"""What this router has sent since the last report counts so often, for what others have sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLoad:
    """One replica as this router sees it."""

    replica_id: str
    work_s: float
    """Predicted seconds ahead of a new request, as of `reported_s`. In prefill: of all that waits
    or runs there. In decode: what the requests that are there add to each step."""
    sent_since_s: float = 0.0
    """Of what this router has sent there since."""
    reported_s: float = 0.0
    """When the replica last said what others have sent, on the clock of `PoolSnapshot.now_s`."""


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
    now_s: float | None = None
    """None where work does not get less by itself: the loads are taken as they are."""
    mean_work_s: float = 0.0
    """Of the replicas' `work_s`."""
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
    """How many replicas a router compares, picked at random where they are not all.

    One that is alone compares all. Several may too: each looks at reports of another age and knows
    its own requests best, so they do not herd; simulated, more choices were better up to all of 64.
    More than that costs time and gains little.
    """
    return num_replicas if num_routers == 1 else min(num_replicas, MAX_CANDIDATES)


def predicted_work_s(load: ReplicaLoad, snapshot: PoolSnapshot) -> float:
    """What is ahead of a new request now, from what was known when the replica last reported.

    Of what came through this router, all is known: work is done at one second a second. Others go
    on sending, most to where there is least: what is theirs tends to the mean of the pool. They see
    much the same, so where this router has sent something since, others have too. The two count by
    the share of requests that each is likely to have.
    """
    work_s = load.work_s + load.sent_since_s
    if snapshot.now_s is None:
        return work_s
    age_s = snapshot.now_s - load.reported_s
    known_s = max(0.0, work_s - age_s)
    if snapshot.num_routers == 1:
        return known_s
    differs_s = load.work_s - snapshot.mean_work_s
    usual_s = snapshot.mean_work_s + differs_s * math.exp(-age_s / FORGETTING_S)
    share = 1 / snapshot.num_routers
    return share * known_s + (1 - share) * (usual_s + OTHERS_TOO * load.sent_since_s)


def pick_p2c(snapshot: PoolSnapshot, rng: Rng) -> RoutePlan:
    """The first to be done of some picked at random and of those that know the prompt.

    Power of two choices (Mitzenmacher, TPDS 2001), with as many choices as are worth their time.
    """
    replicas = snapshot.replicas
    num = num_candidates(num_routers=snapshot.num_routers, num_replicas=len(replicas))
    if num == len(replicas):
        return _first_done(replicas, snapshot, "least work of all")
    return _first_done(rng.sample(replicas, num), snapshot, f"least work of {num}")


def pick_least_work(snapshot: PoolSnapshot, rng: Rng) -> RoutePlan:
    """The first to be done of all."""
    return _first_done(snapshot.replicas, snapshot, "least work of all")


def pick_round_robin(snapshot: PoolSnapshot, rng: Rng) -> RoutePlan:
    """Each in turn, by id."""
    ordered = sorted(snapshot.replicas, key=lambda replica: replica.replica_id)
    return _plan(ordered[snapshot.turn % len(ordered)], snapshot, "its turn")


def pick_random(snapshot: PoolSnapshot, rng: Rng) -> RoutePlan:
    return _plan(rng.sample(snapshot.replicas, 1)[0], snapshot, "random")


def _first_done(replicas: Sequence[ReplicaLoad], snapshot: PoolSnapshot, reason: str) -> RoutePlan:
    """Of `replicas` and of those with a part of the prompt, the one that is first done with it."""
    wait_s, _, least = min(
        (predicted_work_s(load, snapshot), load.replica_id, load) for load in replicas
    )
    if snapshot.hits:
        hit_s, _, hit = min(
            (predicted_work_s(hit.load, snapshot) + hit.request_s, hit.load.replica_id, hit)
            for hit in snapshot.hits
        )
        if hit_s <= wait_s + snapshot.request_s:
            return _plan(hit.load, snapshot, "prefix is cached there")
    return _plan(least, snapshot, reason)


def _plan(load: ReplicaLoad, snapshot: PoolSnapshot, reason: str) -> RoutePlan:
    hits = {hit.load.replica_id: hit for hit in snapshot.hits}
    hit = hits.get(load.replica_id)
    return RoutePlan(
        replica_id=load.replica_id,
        reason=reason,
        wait_s=predicted_work_s(load, snapshot),
        request_s=hit.request_s if hit else snapshot.request_s,
        num_cached_tokens=hit.num_cached_tokens if hit else 0,
    )


POLICIES: dict[str, Policy] = {
    "p2c": pick_p2c,
    "least_work": pick_least_work,
    "round_robin": pick_round_robin,
    "random": pick_random,
}
