"""The Serve deployment that both pools are made of: a light shell around a phase's server.

Serve imports this module to build the application, in a process that runs no engine; importing vLLM
there would cost ten seconds of every start. So it is imported where the replica runs.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from engine.errors import ReplicaLeaves
from engine.exit_cause import EngineExit
from engine.log_handlers import keep_log_handlers
from engine.preemption import Preemption
from engine.serve_port import keep_to_cluster_address
from kvtransfer.tls import TlsFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What a replica needs to start its engine."""

    model: str
    options: Mapping[str, Any]
    """vLLM engine arguments, as configured."""
    lease_s: float
    connector: Literal["nixl", "nccl"]
    backends: tuple[str, ...]
    shared_memory: Literal["auto", "never"]
    read_timeout_s: float
    progress_delay_us: int | None
    stall_timeout_s: float
    """An engine core that gives no sign of life for this long is replaced."""
    drain_s: float
    """How long a replica that leaves may take to finish what it has."""
    tls: TlsFiles | None = None
    """Of the connections between members; None where they are not encrypted."""
    nodes: int = 1
    """That the engine spans. With more than one, each is a bundle of the replica's placement group,
    the first one the replica's own."""


class EngineDeployment:
    """One replica of a pool, as Serve sees it. Owns the phase's server, and how it leaves."""

    async def __init__(self, server: str, settings: EngineSettings) -> None:  # type: ignore[misc]
        # Serve awaits an async constructor. `server` is `module:class`, an engine.server's.
        keep_log_handlers()
        keep_to_cluster_address()
        module, _, name = server.partition(":")
        self._server = getattr(import_module(module), name)(settings)
        self._leaving: asyncio.Task[None] | None = None
        await self._server.start()
        loop = asyncio.get_running_loop()
        self._preemption = Preemption(lambda: loop.call_soon_threadsafe(self._preempted))
        self._server.ended.add_done_callback(self._engine_ended)

    def record_replica_metadata(self) -> dict[str, Any]:
        """What routers learn of this replica, through Serve."""
        metadata: dict[str, Any] = self._server.metadata()
        return metadata

    async def check_health(self) -> None:
        """Raises where the replica must be replaced."""
        if self._leaving is not None:
            # So that Serve starts another one now, and not when this one is gone.
            raise ReplicaLeaves
        await self._server.check_health()

    async def __del__(self) -> None:
        # Serve awaits this one as well, when it ends a replica in an orderly way.
        if hasattr(self, "_server"):
            await asyncio.shield(self._leave())

    def _engine_ended(self, ended: asyncio.Future[EngineExit]) -> None:
        # Without its engine the process is of no use. Ray shows these words as why it has ended,
        # and Serve sees it sooner than it would by health checks, of which it wants several.
        if not ended.cancelled():
            self._preemption.exit(ended.result().text)

    def _preempted(self) -> None:
        self._leave().add_done_callback(lambda _: self._preemption.exit())

    def _leave(self) -> asyncio.Task[None]:
        """Drains and stops, once; whoever asks again waits for the same end."""
        if self._leaving is None:
            self._leaving = asyncio.create_task(self._drain_and_stop())
        return self._leaving

    async def _drain_and_stop(self) -> None:
        await self._server.drain()
        self._server.stop()
