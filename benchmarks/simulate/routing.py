"""Simulated routers: the production policies on each router's own, partly stale, view.

A router knows at once what it sent and what it saw end; of what others sent it knows what replicas
last reported.
"""

import random
from collections.abc import Sequence

from benchmarks.simulate.pools import SimPool, SimReplica
from benchmarks.simulate.requests import SimRequest
from router.policies import POLICIES, PoolSnapshot, ReplicaLoad


class Ledger:
    """One router's view of one pool. Owns the sums of what it sent, by replica index."""

    def __init__(self) -> None:
        self.sent_s: dict[int, float] = {}
        self.others_s: dict[int, float] = {}
        self._loads: list[ReplicaLoad] = []
        self._places: dict[int, int] = {}

    @property
    def loads(self) -> tuple[ReplicaLoad, ...]:
        return tuple(self._loads)

    def set_replicas(self, replicas: Sequence[SimReplica]) -> None:
        """The replicas that may get requests have changed."""
        self._places = {each.index: place for place, each in enumerate(replicas)}
        self._loads = [
            ReplicaLoad(replica_id=each.replica_id, work_s=self._work_s(each.index))
            for each in replicas
        ]

    def add(self, index: int, work_s: float) -> None:
        self.sent_s[index] = self.sent_s.get(index, 0.0) + work_s
        self._renew(index)

    def forget(self, index: int) -> None:
        self.sent_s.pop(index, None)
        self.others_s.pop(index, None)

    def report(self, others_s: dict[int, float]) -> None:
        """What each replica says that others sent."""
        self.others_s = others_s
        for index in self._places:
            self._renew(index)

    def _work_s(self, index: int) -> float:
        # A difference of sums of floats may end up below nothing.
        return max(self.sent_s.get(index, 0.0) + self.others_s.get(index, 0.0), 0.0)

    def _renew(self, index: int) -> None:
        place = self._places.get(index)
        if place is not None:
            replica_id = self._loads[place].replica_id
            self._loads[place] = ReplicaLoad(replica_id=replica_id, work_s=self._work_s(index))


class SimRouter:
    """Owns its ledgers and its random numbers."""

    def __init__(self, router_id: int, num_routers: int, policy: str, seed: int) -> None:
        self.router_id = router_id
        self.num_routers = num_routers
        self.ledgers: dict[str, Ledger] = {"prefill": Ledger(), "decode": Ledger()}
        self._turns = {"prefill": 0, "decode": 0}
        self._policy = POLICIES[policy]
        self._rng = random.Random(f"{seed}/{router_id}")

    def pick(self, pool: SimPool, request: SimRequest, work_s: float) -> SimReplica:
        """Picks a ready replica, of which there must be one, and enters the work."""
        ledger = self.ledgers[pool.name]
        snapshot = PoolSnapshot(
            replicas=ledger.loads,
            turn=self._turns[pool.name],
            num_routers=self.num_routers,
            request_s=work_s,
        )
        self._turns[pool.name] += 1
        plan = self._policy(snapshot, self._rng)
        replica = pool.by_id[plan.replica_id]
        request.work_s = work_s
        ledger.add(replica.index, work_s)
        return replica

    def settle(self, pool: SimPool, replica: SimReplica, request: SimRequest) -> None:
        """The replica is done with the request."""
        self.ledgers[pool.name].add(replica.index, -request.work_s)


def report_loads(routers: Sequence[SimRouter], pool: SimPool) -> None:
    """Every replica tells every router what the others sent, as of now."""
    indices = [each.index for each in pool.ready]
    ledgers = [router.ledgers[pool.name] for router in routers]
    totals = {
        index: sum(ledger.sent_s.get(index, 0.0) for ledger in ledgers) for index in indices
    }
    for ledger in ledgers:
        ledger.report({index: totals[index] - ledger.sent_s.get(index, 0.0) for index in indices})
