"""Simulated routers: production's ledgers, plans and placement over simulated pools.

A router knows at once what it sent; of what others sent and of how far a replica is, it knows what
that replica last reported to it.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from benchmarks.simulate.model.pools import ReplicaState, SimPool, SimReplica
from benchmarks.simulate.model.profiles import EngineProfile
from benchmarks.simulate.model.requests import SimRequest
from router.cost_fit import PoolCost
from router.pairs import Pairs
from router.placement import Placer
from router.planner import PoolPlanner
from router.policies import POLICIES, Policy
from router.prediction import Predictor
from router.reroute import asks_acknowledgements
from router.routes import Route, RoutePlan
from router.settings import RoutingSettings
from router.transfers import Transfers

SPLIT = RoutePlan(route=Route.PREFILL_FIRST, reason="default")
WHOLE = RoutePlan(route=Route.PREFILL_ONLY, reason="no_decode_replica")
"""Prefill goes on without a decode pool: what it has computed waits for one."""


@dataclass(frozen=True, slots=True)
class SeenLoad:
    """What a replica says of itself (a `router.planner.ReplicaReport`)."""

    num_running: int
    num_waiting: int
    kv_usage_fraction: float
    has_suspect: bool = False


@dataclass(frozen=True, slots=True)
class SeenReplica:
    """A replica as one router sees it (a `router.planner.PlannedReplica`)."""

    seen: "SeenPool"
    replica: SimReplica

    @property
    def replica_id(self) -> str:
        return self.replica.replica_id

    @property
    def is_leaving(self) -> bool:
        return self.replica.state is not ReplicaState.READY

    @property
    def work_s(self) -> float:
        return self.seen.ledger.work_s(self.replica_id)

    @property
    def prefilling_s(self) -> float:
        return sum(self.seen.prefilling.get(self.replica_id, {}).values())

    @property
    def kv_bytes_per_token(self) -> float | None:
        return self.seen.kv_bytes_per_token

    @property
    def num_ranks(self) -> int:
        """Profiles are of whole engines."""
        return 1

    @property
    def load(self) -> SeenLoad:
        engine = self.replica.engine
        return SeenLoad(engine.num_running, len(engine.waiting), engine.kv_usage_fraction)


class SeenPool(PoolPlanner):
    """A pool as one router sees it. Owns what that router has there."""

    def __init__(
        self,
        pool: SimPool,
        *,
        router_id: int,
        policy: Policy,
        rng: random.Random,
        clock: Callable[[], float],
        num_routers: int,
        transfers: Transfers,
        kv_bytes_per_token: float | None = None,
    ) -> None:
        super().__init__(
            pool.name,
            policy,
            rng,
            clock,
            num_routers=num_routers,
            transfers=transfers,
            cost=pool_cost(pool.profile),
        )
        self.prefilling: dict[str, dict[int, float]] = {}
        """By replica of decode: the prompts that it prefills itself."""
        self._pool = pool
        self.kv_bytes_per_token = kv_bytes_per_token
        self._router_id = router_id

    def __getitem__(self, replica_id: str) -> SeenReplica:
        return SeenReplica(self, self._pool.by_id[replica_id])

    def __iter__(self) -> Iterator[SeenReplica]:
        return (self[replica_id] for replica_id in self.ledger.open_ids)

    def add(
        self,
        request: SimRequest,
        replica_id: str,
        work_s: float,
        *,
        deadline_s: float | None = None,
    ) -> None:
        """A request is sent there."""
        request.work_s = work_s
        self.ledger.add(
            replica_id,
            str(request.request_id),
            work_s,
            now_s=self._clock(),
            deadline_s=deadline_s,
        )
        self._pool.by_id[replica_id].outstanding.add(self._router_id, work_s)

    def complete(self, request: SimRequest, replica_id: str) -> None:
        """The replica is done with a request."""
        self.ledger.complete(replica_id, str(request.request_id))
        self._pool.by_id[replica_id].outstanding.complete(self._router_id, request.work_s)

    def hear(self, replica_id: str) -> None:
        """A replica tells what the others have sent there, and how far it is."""
        replica = self._pool.by_id[replica_id]
        self.ledger.report(
            replica_id,
            others_work_s=replica.outstanding.others_s(self._router_id),
            progress_s=replica.engine.progress_s,
            now_s=self._clock(),
        )

    def left(self, replica_id: str) -> None:
        super().left(replica_id)
        self.prefilling.pop(replica_id, None)


class KnownTransfers(Predictor):
    """Responses are expected to be as long as is typical, transfers to take what they take."""

    def __init__(self, transfer_s: Callable[[int], float]) -> None:
        """`transfer_s`: of a prompt of so many tokens."""
        super().__init__()
        self._transfer_s = transfer_s

    def transfer_s(self, num_tokens: int) -> float:
        return self._transfer_s(num_tokens)


class SimRouter:
    """Owns its views of the pools and its random numbers."""

    def __init__(
        self,
        router_id: int,
        pools: tuple[SimPool, SimPool],
        clock: Callable[[], float],
        *,
        policy: str,
        num_routers: int,
        settings: RoutingSettings,
        transfer_s: Callable[[int], float],
        kv_bytes_per_token: float | None,
        seed: int,
    ) -> None:
        """
        Args:
            pools: of prefill and decode; may be one.
            transfer_s: from a first token in prefill, of a prompt of so many tokens.
            kv_bytes_per_token: None where routers do not know what KV takes.
        """
        self.router_id = router_id
        self.predictor = KnownTransfers(transfer_s)
        self.transfers = Transfers()
        self.asks_acknowledgements = asks_acknowledgements(
            POLICIES[policy], num_routers=num_routers
        )
        seen = partial(
            SeenPool,
            router_id=router_id,
            policy=POLICIES[policy],
            rng=random.Random(f"{seed}/{router_id}"),
            clock=clock,
            num_routers=num_routers,
            transfers=self.transfers,
            kv_bytes_per_token=kv_bytes_per_token,
        )
        prefill, decode = pools
        self.prefill = seen(prefill)
        self.decode = self.prefill if decode is prefill else seen(decode)
        self.placer = Placer(
            self.prefill,
            self.decode,
            settings,
            pairs=Pairs(),
            num_routers=num_routers,
            predictor=self.predictor,
        )

    def of(self, pool: SimPool) -> SeenPool:
        return self.prefill if pool.name == self.prefill.name else self.decode


def pool_cost(profile: EngineProfile) -> PoolCost:
    """What a router has learned of such engines, what surrounds a step included."""
    cost = profile.decode[0].cost
    return PoolCost(
        prefill=profile.prefill, decode=replace(cost, base_s=profile.overhead_s + cost.base_s)
    )
