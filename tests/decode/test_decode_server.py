"""Whom a decode replica tells that its reads fail."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.metrics.stats import SchedulerStats

from decode.failing_reads import MOST_IN_A_ROW, FailingReads
from decode.server import DecodeServer
from kvtransfer.stats import PairStats


@dataclass
class FakeReplica:
    """Keeps what routers are told."""

    told: list[tuple[str, str]] = field(default_factory=list)

    def say_unready(self, engine_id: str, problem: str) -> None:
        self.told.append((engine_id, problem))


class Seen:
    """Metrics that nobody asks for."""

    def observe(self, stats: SchedulerStats) -> None:
        pass


def stats_of(engine_id: str, *, num_failures: int) -> SchedulerStats:
    stats = PairStats()
    for _ in range(num_failures):
        stats.record_pair_failure(engine_id)
    return SchedulerStats(kv_connector_stats=stats.data)


async def test_routers_are_told_of_a_pair_that_does_not_work() -> None:
    server: Any = DecodeServer.__new__(DecodeServer)
    server.replica, server.metrics = FakeReplica(), Seen()
    server._failing_reads = FailingReads()
    server._stepped = asyncio.Event()
    server.stats_seen(SchedulerStats())
    server.stats_seen(stats_of("p", num_failures=1))
    assert server.replica.told == []
    server.stats_seen(stats_of("p", num_failures=MOST_IN_A_ROW - 1))
    assert server.replica.told == [("p", f"{MOST_IN_A_ROW} reads in a row have failed")]
