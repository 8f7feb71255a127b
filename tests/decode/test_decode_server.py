"""What a decode replica tells of its reads."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.metrics.stats import SchedulerStats

from decode.failing_reads import MOST_IN_A_ROW, FailingReads
from decode.server import DecodeServer
from kvtransfer.memory_reads import CopyTelemetry
from kvtransfer.stats import PairDelta, PairStats


@dataclass
class FakeReplica:
    """Keeps what routers are told."""

    told: list[tuple[str, str]] = field(default_factory=list)
    moved: list[PairDelta] = field(default_factory=list)

    def add_transfers(self, moved: Iterable[PairDelta]) -> None:
        self.moved += moved

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


def new_server() -> Any:
    server: Any = DecodeServer.__new__(DecodeServer)
    server.replica, server.metrics = FakeReplica(), Seen()
    server._failing_reads = FailingReads()
    server._stepped = asyncio.Event()
    return server


async def test_routers_are_told_of_a_pair_that_does_not_work() -> None:
    server = new_server()
    server.stats_seen(SchedulerStats())
    server.stats_seen(stats_of("p", num_failures=1))
    assert server.replica.told == []
    server.stats_seen(stats_of("p", num_failures=MOST_IN_A_ROW - 1))
    assert server.replica.told == [("p", f"{MOST_IN_A_ROW} reads in a row have failed")]


async def test_routers_are_told_what_reads_take() -> None:
    server = new_server()
    stats = PairStats()
    stats.remote_engine_id = "p"
    read = CopyTelemetry(totalBytes=7, xferDuration=2e6, postDuration=0.0, descCount=1)
    stats.record_transfer(read)
    server.stats_seen(SchedulerStats(kv_connector_stats=stats.data))
    (moved,) = server.replica.moved
    assert (moved.remote_engine_id, moved.num_bytes, moved.seconds) == ("p", 7, 2.0)
