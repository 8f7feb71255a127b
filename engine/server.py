"""What the servers of both phases have in common: an engine, its channel, its health.

Owns the life of one replica. What a phase adds is in its own package.
"""

import asyncio
import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import ray
from prometheus_client import CollectorRegistry, Counter, Gauge
from ray import serve
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.metrics.stats import SchedulerStats

from engine.arguments import engine_args
from engine.channel import RouterEnd
from engine.deployment import EngineSettings
from engine.errors import EngineEnded, EngineStalled, ReplicaClosed
from engine.exit_cause import EngineExit
from engine.follower import Share
from engine.followers import Followers
from engine.host import EngineHost
from engine.meeting import RANK_ENV
from engine.metrics import RayExporter
from engine.models import resolve_model
from engine.node_address import keep_to_address
from engine.replica import EngineReplica
from engine.secret import application_secret
from engine.start_failure import tell_router
from kvtransfer.config import kv_transfer_config
from kvtransfer.credentials import Credentials
from kvtransfer.peers import KVPeer
from kvtransfer.phase import Phase
from kvtransfer.side_channel import ReservedPort
from kvtransfer.stats import pair_deltas
from kvtransfer.tls import new_tls

logger = logging.getLogger(__name__)

MAX_NAMED = 100
"""Peers that one replica names in its metrics: Ray keeps every name that it was told."""
OTHERS = "others"
"""How those after them are called."""


class EngineMetrics:
    """The metrics of one replica. Owns its registry."""

    def __init__(self, pool: str, replica_id: str) -> None:
        self.registry = CollectorRegistry()
        own = {"pool": pool, "replica": replica_id}
        pair = ("prefill_engine", "decode_engine")
        self.replica_id = replica_id
        self._named: set[str] = set()

        def gauge(name: str, text: str) -> Any:
            return Gauge(name, text, tuple(own), registry=self.registry).labels(**own)

        def pair_counter(name: str, text: str) -> Counter:
            return Counter(name, text, pair, registry=self.registry)

        self.running = gauge("pdserve_engine_running", "Requests in the engine's batch.")
        self.waiting = gauge("pdserve_engine_waiting", "Requests in the engine's queue.")
        self.kv_usage = gauge(
            "pdserve_engine_kv_usage_fraction", "Share of the KV cache's blocks in use."
        )
        self.transfers = pair_counter("pdserve_kv_transfers", "KV transfers completed.")
        self.copies = pair_counter(
            "pdserve_kv_transfers_copied",
            "Of them, those copied from shared memory, without NIXL.",
        )
        self.bytes = pair_counter("pdserve_kv_transfer_bytes", "KV bytes transferred.")
        self.seconds = pair_counter("pdserve_kv_transfer_seconds", "Seconds spent transferring KV.")
        self.failures = pair_counter(
            "pdserve_kv_transfer_failures", "KV reads that failed; a request has two."
        )
        self.ended_leases = pair_counter(
            "pdserve_kv_ended_leases", "KV read after its lease, not used."
        )
        self._of_pairs = (
            self.transfers,
            self.copies,
            self.bytes,
            self.seconds,
            self.failures,
            self.ended_leases,
        )

    def observe(self, stats: SchedulerStats) -> None:
        self.running.set(stats.num_running_reqs)
        self.waiting.set(stats.num_waiting_reqs + stats.num_skipped_waiting_reqs)
        self.kv_usage.set(stats.kv_cache_usage)
        if not stats.kv_connector_stats:
            return
        # Decode does the reading, so it is this replica.
        for moved in pair_deltas(stats.kv_connector_stats):
            pair = (self._name(moved.remote_engine_id), self.replica_id)
            self.transfers.labels(*pair).inc(moved.num_transfers)
            self.copies.labels(*pair).inc(moved.num_copies)
            self.bytes.labels(*pair).inc(moved.num_bytes)
            self.seconds.labels(*pair).inc(moved.seconds)
            self.failures.labels(*pair).inc(moved.num_failures)
            self.ended_leases.labels(*pair).inc(moved.num_ended_leases)

    def forget(self, engine_ids: Iterable[str]) -> None:
        """These engines will not come back: their pairs with this one have no counters any more."""
        for engine_id in engine_ids:
            for counter in self._of_pairs:
                counter.remove(engine_id, self.replica_id)

    def _name(self, engine_id: str) -> str:
        if len(self._named) < MAX_NAMED:
            self._named.add(engine_id)
        return engine_id if engine_id in self._named else OTHERS


class EngineServer:
    """A replica that owns one engine. Its subclasses are the servers of the two phases."""

    phase: Phase

    def __init__(self, settings: EngineSettings) -> None:
        context = serve.get_replica_context()
        self.settings = settings
        self.application: str = context.app_name
        self._stepped = asyncio.Event()
        self.engine_id: str = context.replica_id.unique_id
        self.metrics = EngineMetrics(context.deployment, self.engine_id)

    async def start(self) -> None:
        """Starts the engine and lets routers in."""
        settings = self.settings
        host_ip = ray.util.get_node_ip_address()
        tls = new_tls(settings.tls)
        credentials = Credentials(secret=application_secret(self.application), tls=settings.tls)
        keep_to_address(host_ip)
        # Routers tell decode engines where to find this one before it has handed anything over.
        with ReservedPort(host_ip) as side_channel:
            transfer = kv_transfer_config(
                self.phase,
                engine_id=self.engine_id,
                lease_s=int(settings.lease_s),
                connector=settings.connector,
                backends=settings.backends,
                shared_memory=settings.shared_memory,
                read_timeout_s=settings.read_timeout_s,
                progress_delay_us=settings.progress_delay_us,
                side_channel_port=side_channel.port,
            )
            options: dict[str, Any] = {**settings.options, "kv_transfer_config": transfer}
            followers = None
            if settings.nodes > 1:
                followers = await Followers.start(host_ip, self._share(options))
                os.environ.update(RANK_ENV)
                options |= followers.options()
            args = engine_args(resolve_model(settings.model), options)
            try:
                self.host = await EngineHost.start(
                    args, credentials=credentials, followers=followers
                )
            except EngineEnded as end:
                await tell_router(self.application, self.phase, self.engine_id, end.exit)
                raise
        tp_size = self.host.config.parallel_config.tensor_parallel_size
        kv = KVPeer(engine_id=self.engine_id, host=host_ip, port=side_channel.port, tp_size=tp_size)
        self.replica = EngineReplica(self.host, kv, self)
        await self.replica.open(
            host_ip, credentials.secret, tls=tls, stall_timeout_s=settings.stall_timeout_s
        )
        self._exporter = asyncio.create_task(RayExporter(self.metrics.registry).run())

    def _share(self, options: Mapping[str, Any]) -> Share:
        return Share(
            application=self.application,
            model=self.settings.model,
            options=options,
            tls=self.settings.tls,
        )

    # What the deployment calls.

    def metadata(self) -> dict[str, Any]:
        """Where routers find this replica, and as whom."""
        assert self.replica.address is not None
        host, port = self.replica.address
        return {"host": host, "port": port, "engine_id": self.engine_id}

    async def check_health(self) -> None:
        """Raises where the engine is dead or gives no sign of life: Serve replaces the replica.

        Serve wants several failures in a row. Routers were told at the first, so it stays failed.
        """
        if self.replica.closed_because is not None:
            raise ReplicaClosed(self.replica.closed_because)
        try:
            await self.host.check(self.settings.stall_timeout_s)
        except Exception as error:
            if isinstance(error, EngineStalled):
                # So that routers name it right: once is nobody's fault (`router.faults`).
                self.replica.say_leaving("stalled")
            self.replica.close(f"unhealthy: {error}")
            raise

    async def drain(self) -> None:
        """Takes nothing new, and returns when what it has is finished or `drain_s` is over."""
        if hasattr(self, "replica"):
            self.replica.say_leaving("drained")
            with suppress(TimeoutError):
                async with asyncio.timeout(self.settings.drain_s):
                    while self.is_busy:
                        self._stepped.clear()
                        await self._stepped.wait()

    @property
    def is_busy(self) -> bool:
        """Whether somebody still needs this replica."""
        return self.replica.num_requests > 0

    @property
    def ended(self) -> asyncio.Future[EngineExit]:
        """Done where the engine has ended by itself."""
        return self.replica.ended

    def stop(self) -> None:
        """Ends the connections and the engine, if they were started."""
        if hasattr(self, "replica"):
            self.replica.close("the replica was stopped")
            self.host.stop()

    # What the phases may add to (engine.replica.PhaseHooks).

    def output_sent(self, router: RouterEnd, output: EngineCoreOutput) -> None:
        pass

    def output_orphaned(self, output: EngineCoreOutput) -> None:
        pass

    def released(self, request_ids: list[str]) -> None:
        pass

    def router_gone(self, router: RouterEnd) -> None:
        pass

    def num_kept(self) -> int:
        return 0

    def forgotten(self, engine_ids: list[str]) -> None:
        self.metrics.forget(engine_ids)

    def stats_seen(self, stats: SchedulerStats) -> None:
        self._stepped.set()
        self.metrics.observe(stats)
