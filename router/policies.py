"""Routing policies: pure functions from a snapshot of one pool to a replica, with the reason.

A policy compares when the request would be done: the predicted work that is ahead of it, and what
it costs itself, which is less where a part of it is cached. Ties break by replica id.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from router.transfers import TransferEstimate

MAX_CANDIDATES = 64
"""Replicas that one of several routers compares for a request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLoad:
    """One replica as this router sees it."""

    replica_id: str
    work_s: float
    """Predicted seconds ahead of a new request that this router knows of, as of `counted_s`. In
    prefill: of all that waits or runs there. In decode: what the requests that are there add to
    each step."""
    counted_s: float = 0.0
    """When it was last told or sent something, on the clock of `PoolSnapshot.now_s`."""
    reported_s: float = 0.0
    """When the replica last said what others have sent, on the same clock."""


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
    others_work_per_s: float = 0.0
    """Seconds of work that the other routers together are likely to send to the pool a second."""
    request_s: float = 0.0
    """Predicted seconds of the request where nothing of it is cached."""
    hits: tuple[PrefixHit, ...] = ()
    """Of those replicas, the ones with a part of the prompt."""
    transfer: TransferEstimate | None = None
    """Of KV that the replica is to fetch; it counts with the work ahead."""
    near: tuple[ReplicaLoad, ...] = ()
    """Of those replicas, some that are on the KV's node, to be compared too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaPlan:
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
    def random(self) -> float: ...


class Pick(Protocol):
    def __call__(self, snapshot: PoolSnapshot, rng: Rng) -> ReplicaPlan: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How a replica is picked."""

    pick: Pick
    is_predictive: bool
    """It goes by predicted work, so what a replica says of its own corrects it."""

    def __call__(self, snapshot: PoolSnapshot, rng: Rng) -> ReplicaPlan:
        return self.pick(snapshot, rng)


def num_candidates(*, num_routers: int, num_replicas: int) -> int:
    """How many replicas a router compares, picked at random where they are not all.

    One that is alone compares all. Several may too: each looks at reports of another age and knows
    its own requests best, so they do not herd; simulated, more choices were better up to all of 64.
    More than that costs time and gains little.
    """
    return num_replicas if num_routers == 1 else min(num_replicas, MAX_CANDIDATES)


def predicted_work_s(load: ReplicaLoad, snapshot: PoolSnapshot) -> float:
    """What is ahead of a new request now.

    What this router knows of is done at one second a second. Since the last report, others have
    gone on sending, as much as this router each: more, the longer ago, yet not without end, as they
    turn to other replicas then. At first that is their rate, in the end the pool's mean.
    """
    if snapshot.now_s is None:
        return load.work_s
    known_s = max(0.0, load.work_s - (snapshot.now_s - load.counted_s))
    mean_s = snapshot.mean_work_s
    if not snapshot.others_work_per_s or mean_s <= 0.0:
        return known_s
    arrived_s = _arrived_s(snapshot.now_s - load.reported_s, snapshot) / len(snapshot.replicas)
    return known_s + mean_s * (1 - math.exp(-arrived_s / mean_s))


def _arrived_s(age_s: float, snapshot: PoolSnapshot) -> float:
    """Work that others have sent to the pool in the last `age_s` seconds."""
    return snapshot.others_work_per_s * age_s


def pick_p2c(snapshot: PoolSnapshot, rng: Rng) -> ReplicaPlan:
    """One of the first to be done of some picked at random and of those that know the prompt.

    Power of two choices (Mitzenmacher, TPDS 2001), with as many choices as are worth their time.
    Where others may have heard of the same idle replica, not all must go to the one that looks
    best: see `_spread`.
    """
    replicas = snapshot.replicas
    num = num_candidates(num_routers=snapshot.num_routers, num_replicas=len(replicas))
    reason = "least work of all" if num == len(replicas) else f"least work of {num}"
    candidates: Sequence[ReplicaLoad] = replicas
    if num < len(replicas):
        candidates = [*rng.sample(replicas, num), *snapshot.near]
    if snapshot.now_s is None or not snapshot.others_work_per_s:
        return _first_done(candidates, snapshot, reason)
    waits = sorted((predicted_work_s(load, snapshot), load.replica_id, load) for load in candidates)
    least_s, _, least = waits[0]
    if hit := _better_hit(least_s, snapshot):
        return _plan(hit, snapshot, "prefix is cached there")
    chosen = _spread(waits, snapshot, rng)
    return _plan(chosen, snapshot, reason if chosen is least else "among those with little work")


def _spread(
    waits: Sequence[tuple[float, str, ReplicaLoad]], snapshot: PoolSnapshot, rng: Rng
) -> ReplicaLoad:
    """Picks by how much of the others' work each would take if they filled the idlest ones first.

    As in Dahlin, Interpreting Stale Load Information (TPDS 2000), but only for the work of those
    routers that know what this one knows of the first replica. Reports reach routers at times of
    their own, so if this one is half as old as the others are on average, a quarter of the routers
    have had a later one; that share has grown from nothing since this report was made.

    Args:
        waits: predicted work of the candidates, least first.
    """
    assert snapshot.now_s is not None
    now_s, first = snapshot.now_s, waits[0][2]
    age_s = now_s - first.reported_s
    mean_age_s = sum(now_s - load.reported_s for _, _, load in waits) / len(waits)
    if age_s <= 0.0:
        return first
    share = min(1.0, age_s / (2 * mean_age_s)) / 2
    level_s = _level_s(
        [wait_s for wait_s, _, _ in waits],
        share * _arrived_s(age_s, snapshot) * len(waits) / len(snapshot.replicas),
    )
    left_s = rng.random() * sum(max(0.0, level_s - wait_s) for wait_s, _, _ in waits)
    for wait_s, _, load in waits:
        left_s -= level_s - wait_s
        if left_s <= 0.0:
            return load
    return first


def _level_s(waits_s: Sequence[float], work_s: float) -> float:
    """Up to where `work_s` more fills replicas with these waits, least first."""
    filled_s = work_s
    for num, wait_s in enumerate(waits_s):
        if num and filled_s <= num * wait_s:
            return filled_s / num
        filled_s += wait_s
    return filled_s / len(waits_s)


def pick_least_work(snapshot: PoolSnapshot, rng: Rng) -> ReplicaPlan:
    """The first to be done of all."""
    return _first_done(snapshot.replicas, snapshot, "least work of all")


def pick_round_robin(snapshot: PoolSnapshot, rng: Rng) -> ReplicaPlan:
    """Each in turn, by id."""
    ordered = sorted(snapshot.replicas, key=lambda replica: replica.replica_id)
    return _plan(ordered[snapshot.turn % len(ordered)], snapshot, "its turn")


def pick_random(snapshot: PoolSnapshot, rng: Rng) -> ReplicaPlan:
    return _plan(rng.sample(snapshot.replicas, 1)[0], snapshot, "random")


def _first_done(
    replicas: Sequence[ReplicaLoad], snapshot: PoolSnapshot, reason: str
) -> ReplicaPlan:
    """Of `replicas` and of those with a part of the prompt, the one that is first done with it."""
    if snapshot.transfer is not None:
        return _plan(_first_with_kv(replicas, snapshot, snapshot.transfer), snapshot, reason)
    wait_s, _, least = min(
        (predicted_work_s(load, snapshot), load.replica_id, load) for load in replicas
    )
    hit = _better_hit(wait_s, snapshot)
    return _plan(hit, snapshot, "prefix is cached there") if hit else _plan(least, snapshot, reason)


def _first_with_kv(
    replicas: Sequence[ReplicaLoad], snapshot: PoolSnapshot, transfer: TransferEstimate
) -> ReplicaLoad:
    """The one that is first done where the request's KV has yet to come there."""
    least_s, first = math.inf, replicas[0]
    for load in replicas:
        ahead_s = predicted_work_s(load, snapshot)
        if ahead_s > least_s:
            continue  # Whatever the KV takes.
        ahead_s += transfer.step_share_s(load.replica_id)
        if (ahead_s, load.replica_id) < (least_s, first.replica_id):
            least_s, first = ahead_s, load
    return first


def _better_hit(wait_s: float, snapshot: PoolSnapshot) -> ReplicaLoad | None:
    """A replica with a part of the prompt that is done no later than an uncached one would be."""
    if not snapshot.hits:
        return None
    hit_s, _, load = min(
        (predicted_work_s(hit.load, snapshot) + hit.request_s, hit.load.replica_id, hit.load)
        for hit in snapshot.hits
    )
    return load if hit_s <= wait_s + snapshot.request_s else None


def _plan(load: ReplicaLoad, snapshot: PoolSnapshot, reason: str) -> ReplicaPlan:
    hits = {hit.load.replica_id: hit for hit in snapshot.hits}
    hit = hits.get(load.replica_id)
    return ReplicaPlan(
        replica_id=load.replica_id,
        reason=reason,
        wait_s=predicted_work_s(load, snapshot),
        request_s=hit.request_s if hit else snapshot.request_s,
        num_cached_tokens=hit.num_cached_tokens if hit else 0,
    )


POLICIES: dict[str, Policy] = {
    "p2c": Policy(pick=pick_p2c, is_predictive=True),
    "least_work": Policy(pick=pick_least_work, is_predictive=True),
    "round_robin": Policy(pick=pick_round_robin, is_predictive=False),
    "random": Policy(pick=pick_random, is_predictive=False),
}
