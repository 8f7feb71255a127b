"""What Serve is told of a replica's health, and what routers are told when it has failed."""

from dataclasses import dataclass, field

import pytest
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.stats import SchedulerStats

from engine.deployment import EngineSettings
from engine.errors import EngineStalled, ReplicaClosed
from engine.server import MAX_NAMED, OTHERS, EngineMetrics, EngineServer
from kvtransfer.stats import PairStats

SETTINGS = EngineSettings(
    model="demo",
    options={},
    lease_s=30.0,
    connector="nixl",
    backends=("UCX",),
    shared_memory="auto",
    read_timeout_s=5.0,
    progress_delay_us=None,
    stall_timeout_s=10.0,
    drain_s=30.0,
)


class FakeHost:
    """An engine that fails its first check as it was told, and is well ever after."""

    def __init__(self, trouble: Exception | None) -> None:
        self._trouble = trouble

    async def check(self, timeout_s: float) -> None:
        trouble, self._trouble = self._trouble, None
        if trouble is not None:
            raise trouble


@dataclass
class FakeReplica:
    """Keeps what routers are told."""

    closed_because: str | None = None
    told: list[str] = field(default_factory=list)

    def say_leaving(self, because: str) -> None:
        self.told.append(because)

    def close(self, reason: str) -> None:
        self.closed_because = reason
        self.told.append(f"closed: {reason}")


def server(trouble: Exception | None) -> tuple[EngineServer, FakeReplica]:
    """A server without the engine and the Serve replica that its constructor asks for."""
    made, replica = EngineServer.__new__(EngineServer), FakeReplica()
    made.settings = SETTINGS
    made.host = FakeHost(trouble)  # type: ignore[assignment]
    made.replica = replica  # type: ignore[assignment]
    return made, replica


def moved_with(engine_id: str) -> SchedulerStats:
    stats = PairStats()
    stats.record_pair_failure(engine_id)
    return SchedulerStats(kv_connector_stats=stats.data)


def failures_by_peer(metrics: EngineMetrics) -> dict[str, float]:
    (family,) = metrics.failures.collect()
    return {
        sample.labels["prefill_engine"]: sample.value
        for sample in family.samples
        if sample.name.endswith("_total")
    }


def test_metrics_name_no_peer_that_is_gone_and_few_in_all() -> None:
    metrics = EngineMetrics("decode", "d")
    for number in range(MAX_NAMED):
        metrics.observe(moved_with(f"p{number}"))
    metrics.forget([f"p{number}" for number in range(1, MAX_NAMED)])
    assert failures_by_peer(metrics) == {"p0": 1}
    for number in range(MAX_NAMED, MAX_NAMED + 3):
        metrics.observe(moved_with(f"p{number}"))
    metrics.observe(moved_with("p0"))
    assert failures_by_peer(metrics) == {"p0": 2, OTHERS: 3}


async def test_a_replica_that_is_well() -> None:
    healthy, replica = server(None)
    await healthy.check_health()
    await healthy.check_health()
    assert replica.told == []


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        pytest.param(
            EngineStalled("no answer for 10 s"),
            ["stalled", "closed: unhealthy: no answer for 10 s"],
            id="it hung for a while",
        ),
        pytest.param(EngineDeadError(), [f"closed: unhealthy: {EngineDeadError()}"], id="it died"),
    ],
)
async def test_a_replica_that_failed_once_stays_failed(trouble: Exception, told: list[str]) -> None:
    """Routers leave it at the first failure; Serve wants several before it replaces it."""
    failing, replica = server(trouble)
    with pytest.raises(type(trouble)):
        await failing.check_health()
    for _ in range(2):
        with pytest.raises(ReplicaClosed):
            await failing.check_health()
    assert replica.told == told
