"""What carries one router's requests through two pools, put together.

Owns the parts: the pools, the lifecycle of requests, and their failover. vLLM's front end drives
them through `router.core_client`; tests drive them without it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from kvtransfer.phase import PHASES
from router.audit import RouterHoldings
from router.dispatcher import Dispatcher
from router.failover import Failover
from router.lifecycle import RequestLifecycle, Waits
from router.metrics import RouterMetrics
from router.output_queue import OutputQueue
from router.pairs import Pairs
from router.placement import Placer
from router.policies import Policy
from router.pool import Pool
from router.prediction import Predictor
from router.recovery import RecoveryLimits
from router.reroute import asks_acknowledgements
from router.scaling_report import ScalingReport
from router.settings import RoutingSettings
from router.traffic import TrafficMeter
from router.transfers import Transfers


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterCore:
    """Made by `build_core`."""

    prefill: Pool
    decode: Pool
    pairs: Pairs
    lifecycle: RequestLifecycle
    failover: Failover
    outputs: OutputQueue
    metrics: RouterMetrics
    traffic: TrafficMeter

    @property
    def pools(self) -> tuple[Pool, Pool]:
        return self.prefill, self.decode

    def close(self, reason: str) -> None:
        """Ends every connection."""
        for pool in self.pools:
            for replica in list(pool):
                replica.end.close(reason)

    def scaling_report(self) -> ScalingReport:
        """What this router counts, and what is outstanding."""
        return self.traffic.report(
            prefill=self.prefill, decode=self.decode, requests=self.lifecycle.requests.values()
        )

    def holdings(self, front_end: frozenset[str]) -> RouterHoldings:
        """What this router has, with what vLLM's front end waits for; for an audit."""
        placed: dict[str, set[str]] = {}
        for state in self.lifecycle.requests.values():
            if state.replica is not None:
                placed.setdefault(state.replica.replica_id, set()).add(state.engine_request_id)
        replicas = [replica for pool in self.pools for replica in pool]
        return RouterHoldings(
            front_end=front_end,
            requests=frozenset(self.lifecycle.requests),
            placed={replica_id: frozenset(ids) for replica_id, ids in placed.items()},
            ledger={each.replica_id: each.pool.ledger.sent(each.replica_id) for each in replicas},
            prefilling={each.replica_id: frozenset(each.prefilling) for each in replicas},
            pending_first_tokens=self.lifecycle.pending_first_tokens,
            suspects=frozenset(state.request_id for state in self.failover.suspects),
            num_inflight=self.metrics.num_inflight(),
        )


def build_core(
    policy: Policy,
    metrics: RouterMetrics,
    limits: RecoveryLimits,
    *,
    traffic: TrafficMeter,
    settings: RoutingSettings | None = None,
    num_routers: int = 1,
    clock: Callable[[], float] = time.monotonic,
) -> RouterCore:
    """The parts of one router of `num_routers`, without a replica; `clock` says when they hang."""
    settings = settings or RoutingSettings()
    transfers, predictor, pairs, outputs = Transfers(), Predictor(), Pairs(), OutputQueue()
    prefill, decode = (
        Pool(name, policy, num_routers=num_routers, transfers=transfers) for name in PHASES
    )
    placer = Placer(
        prefill, decode, settings, pairs=pairs, num_routers=num_routers, predictor=predictor
    )
    dispatcher = Dispatcher(
        prefill,
        decode,
        placer,
        ttft_s=settings.slo.ttft_s,
        asks_acknowledgements=asks_acknowledgements(policy, num_routers=num_routers),
        metrics=metrics,
        traffic=traffic,
    )
    lifecycle = RequestLifecycle(
        prefill,
        decode,
        placer=placer,
        dispatcher=dispatcher,
        waits=Waits(replica_s=limits.max_wait_s, first_token_s=settings.queue_timeout_s),
        outputs=outputs,
        metrics=metrics,
        traffic=traffic,
        predictor=predictor,
    )
    failover = Failover(
        prefill,
        decode,
        lifecycle=lifecycle,
        dispatcher=dispatcher,
        placer=placer,
        limits=limits,
        metrics=metrics,
        clock=clock,
    )
    return RouterCore(
        prefill=prefill,
        decode=decode,
        pairs=pairs,
        lifecycle=lifecycle,
        failover=failover,
        outputs=outputs,
        metrics=metrics,
        traffic=traffic,
    )
