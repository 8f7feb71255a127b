"""Simulated routers: the production ledger and policies, one of each per router and pool.

A router knows at once what it sent; of what others sent and of how far a replica is, it knows what
that replica last reported to it.
"""

import random
from collections.abc import Sequence

from benchmarks.simulate.pools import SimPool, SimReplica
from benchmarks.simulate.requests import SimRequest
from router.ledger import Ledger
from router.policies import POLICIES, ReplicaPlan
from router.reroute import asks_acknowledgements
from router.transfers import TransferEstimate, Transfers


class SimRouter:
    """Owns its ledgers and its random numbers."""

    def __init__(self, router_id: int, num_routers: int, policy: str, seed: int) -> None:
        self.router_id = router_id
        self.ledgers = {
            "prefill": Ledger(num_routers=num_routers),
            "decode": Ledger(num_routers=num_routers, drains=False),
        }
        self.transfers = Transfers()
        self.sent_s: dict[str, float] = {}
        """Outstanding work by replica."""
        self.reading_s: dict[str, dict[int, float]] = {}
        """By decode replica, the prompts that it reads itself."""
        self._policy = POLICIES[policy]
        self.asks_acknowledgements = asks_acknowledgements(self._policy, num_routers=num_routers)
        self._rng = random.Random(f"{seed}/{router_id}")

    def pick(
        self,
        pool: SimPool,
        request: SimRequest,
        work_s: float,
        now_s: float,
        *,
        deadline_s: float | None = None,
        transfer: TransferEstimate | None = None,
    ) -> SimReplica:
        """Picks a ready replica, of which there must be one, and enters the work."""
        plan = self.plan(pool, work_s, now_s, transfer)
        return self.enter(pool, plan, request, work_s, now_s, deadline_s=deadline_s)

    def plan(
        self, pool: SimPool, work_s: float, now_s: float, transfer: TransferEstimate | None = None
    ) -> ReplicaPlan:
        """The replica for a request; at least one must be ready."""
        ledger = self.ledgers[pool.name]
        snapshot = ledger.snapshot(now_s, request_s=work_s, transfer=transfer)
        return self._policy(snapshot, self._rng)

    def enter(
        self,
        pool: SimPool,
        plan: ReplicaPlan,
        request: SimRequest,
        work_s: float,
        now_s: float,
        *,
        deadline_s: float | None = None,
    ) -> SimReplica:
        """Enters the work of a request that goes where the plan says."""
        request.work_s = work_s
        self.ledgers[pool.name].add(
            plan.replica_id,
            str(request.request_id),
            work_s,
            now_s=now_s,
            deadline_s=deadline_s,
        )
        self.sent_s[plan.replica_id] = self.sent_s.get(plan.replica_id, 0.0) + work_s
        return pool.by_id[plan.replica_id]

    def complete(self, pool: SimPool, replica: SimReplica, request: SimRequest) -> None:
        """The replica is done with the request."""
        self.ledgers[pool.name].complete(replica.replica_id, str(request.request_id))
        left_s = self.sent_s.get(replica.replica_id, 0.0) - request.work_s
        self.sent_s[replica.replica_id] = max(left_s, 0.0)  # floats may end up below nothing

    def forget(self, pool: SimPool, replica: SimReplica) -> None:
        """The replica is gone."""
        self.ledgers[pool.name].remove(replica.replica_id)
        self.transfers.remove(replica.replica_id)
        self.sent_s.pop(replica.replica_id, None)
        self.reading_s.pop(replica.replica_id, None)


def report_load(
    routers: Sequence[SimRouter],
    reader: SimRouter,
    pool: SimPool,
    replica: SimReplica,
    now_s: float,
) -> None:
    """A replica tells a router what the others sent there, and how far it is."""
    replica_id = replica.replica_id
    total_s = sum(router.sent_s.get(replica_id, 0.0) for router in routers)
    reader.ledgers[pool.name].report(
        replica_id,
        others_work_s=max(total_s - reader.sent_s.get(replica_id, 0.0), 0.0),
        progress_s=replica.engine.progress_s,
        now_s=now_s,
    )
