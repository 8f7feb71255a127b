"""The router's Serve deployment: the ingress of the application.

A light shell: Serve imports it to build the application, where vLLM would cost ten seconds.
"""

import asyncio
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from engine.errors import ReplicaLeaves
from engine.exit_cause import EngineExit
from engine.log_handlers import keep_log_handlers
from engine.preemption import Preemption
from engine.serve_port import keep_to_cluster_address
from router.settings import RouterSettings


@serve.ingress()
class Router:
    """One router replica, as Serve sees it. Owns how it leaves."""

    def __init__(
        self, settings: RouterSettings, prefill: DeploymentHandle, decode: DeploymentHandle
    ) -> None:
        # The handles tie the pools to this application; requests go over channels of our own.
        self._settings = settings
        self._assembly: Any = None
        self._leaving: asyncio.Task[None] | None = None

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        keep_log_handlers()
        keep_to_cluster_address()
        from router.assembly import Assembly

        self._assembly = Assembly(self._settings)
        app: ASGIApp = await self._assembly.build()
        loop = asyncio.get_running_loop()
        self._preemption = Preemption(lambda: loop.call_soon_threadsafe(self._preempted))
        return app

    async def check_health(self) -> None:
        """Raises where the replica must be replaced."""
        if self._leaving is not None:
            # So that Serve starts another one now, and not when this one is gone.
            raise ReplicaLeaves
        if self._assembly is not None:
            self._assembly.check_front_end()

    async def engine_ended_at_start(self, pool: str, replica_id: str, how: EngineExit) -> None:
        """Called by a replica whose engine has ended before it could join."""
        self._assembly.engine_failures.add(pool, replica_id, how)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve passes on to the scaling policies (`router.scaling_report`)."""
        if self._assembly is None:
            return {}
        stats: dict[str, float] = self._assembly.scaling_report().to_stats()
        return stats

    def _preempted(self) -> None:
        self._leaving = asyncio.create_task(self._leave())

    async def _leave(self) -> None:
        # What Serve asks of a replica that it stops, asked by the replica itself, which cannot
        # wait for that: the proxy's health checks fail from now on, so new requests go elsewhere;
        # the port is closed when the proxy has had time to see it; what runs ends. When Serve asks
        # as well, it waits for the same end.
        ended = ray.get_runtime_context().current_actor.perform_graceful_shutdown.remote()
        await asyncio.wait([ended.as_future()], timeout=self._settings.drain_s)
        self._preemption.exit()
