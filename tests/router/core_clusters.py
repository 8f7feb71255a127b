"""A core client over fake replicas, and how these are lost."""

import time
from collections.abc import Callable

from fake_replicas import FakeEnd
from prometheus_client import CollectorRegistry
from vllm.v1.engine import EngineCoreOutput

from engine.exit_cause import EngineExit
from engine.wire import LoadReport, StepOutputs
from router.audit import audit
from router.core_client import ClusterCoreClient
from router.metrics import PoolMetrics, RouterMetrics
from router.policies import POLICIES
from router.pool import Pool, Replica
from router.recovery import RecoveryLimits
from router.settings import Targets
from router.traffic import TrafficMeter

LIMITS = RecoveryLimits(max_moves=3, max_wait_s=120.0, stall_timeout_s=10.0)


class Cluster:
    """A core client over fake replicas, `num` in each pool."""

    def __init__(
        self,
        num: int = 1,
        *,
        limits: RecoveryLimits = LIMITS,
        targets: Targets | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.registry = CollectorRegistry()
        traffic = TrafficMeter(ttft_s=1.0, itl_s=1.0)
        metrics = RouterMetrics(self.registry, traffic)
        self.core = ClusterCoreClient(
            POLICIES["round_robin"],
            metrics,
            limits,
            traffic=traffic,
            targets=targets,
            clock=clock,
        )
        PoolMetrics((self.core.prefill, self.core.decode), self.registry)
        self.prefill = [self.join(self.core.prefill, f"p{index}") for index in range(num)]
        self.decode = [self.join(self.core.decode, f"d{index}") for index in range(num)]

    def join(self, pool: Pool, replica_id: str) -> Replica:
        replica = Replica(replica_id, pool, on_gone=lambda _: None)
        replica.end = FakeEnd()  # type: ignore[assignment]
        pool.insert(replica)
        return replica

    def outputs(self) -> list[EngineCoreOutput]:
        """What the front end has been given since the last call."""
        queue, outputs = self.core._outputs, []
        while not queue.empty():
            outputs += queue.get_nowait().outputs
        return outputs

    def check_settled(self) -> None:
        """Nothing is left anywhere: no request, no line in a ledger, no gauge above zero."""
        holdings = self.core.holdings(frozenset())
        assert audit(holdings, holdings, {}).disagreements == ()
        assert self.core._requests == self.core._in_engines == {}
        for replica in (*self.prefill, *self.decode):
            if replica in list(replica.pool):
                assert replica.pool.ledger.num_sent(replica.replica_id) == 0
        for phase in ("waiting", "prefilling", "transferring", "decoding"):
            inflight = self.registry.get_sample_value("pdserve_inflight", {"phase": phase})
            assert not inflight


def lose(replica: Replica) -> None:
    """The replica's connection breaks."""
    replica.replica_gone("killed")


def fail(replica: Replica, *, num_requests: int = 2) -> None:
    """The replica's engine ends with so many requests, and the replica says so."""
    how = "the engine was ended by SIGSEGV"
    replica.engine_ended(EngineExit(cause="SIGSEGV", text=how, num_requests=num_requests))
    replica.replica_gone("the engine was ended by SIGSEGV")


def hang(replica: Replica) -> None:
    """The replica says that its engine does not answer."""
    replica.step_received(StepOutputs([], LoadReport(leaves_because="stalled")))
    replica.replica_gone("unhealthy")
