"""Handovers stay within a node where that is sooner, by what replicas have said of their reads."""

import pytest
from fake_replicas import end_of, join, prefilled, request, step
from prometheus_client import CollectorRegistry

from engine.wire import LoadReport, StepOutputs, Transferred
from router.core_client import ClusterCoreClient
from router.metrics import PoolMetrics, RouterMetrics
from router.policies import POLICIES
from router.pool import Replica
from router.recovery import RecoveryLimits
from router.traffic import TrafficMeter

NEAR_S, FAR_S = 0.002, 0.05
"""Of the reads that replicas report, of 1 MB each."""


class Cluster:
    """A core client over fake replicas on two nodes: p0, d0 and p1, d1."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        traffic = TrafficMeter(ttft_s=1.0, itl_s=1.0)
        self.core = ClusterCoreClient(
            POLICIES["p2c"],
            RouterMetrics(self.registry, traffic),
            RecoveryLimits(max_moves=3, max_wait_s=120.0, stall_timeout_s=10.0),
            traffic=traffic,
        )
        PoolMetrics((self.core.prefill, self.core.decode), self.registry)
        self.num_sent = 0
        for node in ("0", "1"):
            for pool, kind in ((self.core.prefill, "p"), (self.core.decode, "d")):
                # A token of 1 MB: a fake prompt has three.
                join(pool, kind + node, block_size=64, node_id=node, kv_bytes_per_token=1e6)

    async def hand_over(self, prefill_id: str) -> str:
        """The decode replica that goes on with what a prefill replica has read."""
        self.num_sent += 1
        name = f"r{self.num_sent}"
        other = self.core.prefill["p1" if prefill_id == "p0" else "p0"]
        other.set_listed(False)
        await self.core.add_request_async(request(name, max_tokens=50))
        other.set_listed(True)
        step(self.core.prefill[prefill_id], prefilled(request_id=name))
        (replica_id,) = [
            each.replica_id
            for each in self.core.decode
            if name in [added.request_id for added in end_of(each).added()]
        ]
        return replica_id

    def say_reads(self) -> None:
        for decode in self.core.decode:
            for prefill in self.core.prefill:
                took_s = NEAR_S if prefill.node_id == decode.node_id else FAR_S
                told = [Transferred(prefill.replica_id, 10, 10_000_000, 10 * took_s)]
                decode.transferred(told)


def busy(replica: Replica, work_s: float) -> None:
    """Others have sent so much there."""
    replica.step_received(StepOutputs([], LoadReport(others_work_s=work_s)))


def test_what_reads_take_is_a_metric() -> None:
    cluster = Cluster()
    cluster.say_reads()
    for way, seconds in (("within_node", NEAR_S), ("between_nodes", FAR_S)):
        terms = {
            term: cluster.registry.get_sample_value(
                "pdserve_kv_read_cost_seconds", {"way": way, "term": term}
            )
            for term in ("read", "gigabyte")
        }
        assert None not in terms.values()
        assert (terms["read"] or 0.0) + (terms["gigabyte"] or 0.0) / 1000 == pytest.approx(
            seconds, rel=0.1
        )


async def test_what_is_idle_on_the_node_of_the_kv_gets_it() -> None:
    for measured in (False, True):
        cluster = Cluster()
        if measured:
            cluster.say_reads()
        assert await cluster.hand_over("p0") == "d0"
        assert await cluster.hand_over("p1") == "d1"


async def test_work_counts_as_much_as_the_way() -> None:
    cluster = Cluster()
    cluster.say_reads()
    # Three megabytes take 150 ms from another node: 3 ms of each of fifty steps.
    busy(cluster.core.decode["d0"], 0.002)
    assert await cluster.hand_over("p0") == "d0"
    busy(cluster.core.decode["d0"], 0.004)
    assert await cluster.hand_over("p0") == "d1"


async def test_replicas_that_do_not_say_how_large_their_kv_is_are_chosen_by_work() -> None:
    cluster = Cluster()
    cluster.say_reads()
    for replica in cluster.core.prefill:
        replica.facts = None
    busy(cluster.core.decode["d1"], 0.0001)
    assert await cluster.hand_over("p1") == "d0"


async def test_what_was_measured_goes_with_the_replica() -> None:
    cluster = Cluster()
    cluster.say_reads()
    cluster.core.decode["d0"].replica_gone("killed")
    assert await cluster.hand_over("p0") == "d1"
    join(cluster.core.decode, "d2", block_size=64, node_id="0", kv_bytes_per_token=1e6)
    assert await cluster.hand_over("p0") == "d2"
