"""The router's Serve deployment: the ingress of the application."""

import asyncio
import dataclasses
from dataclasses import dataclass

from engine.demo_model import resolve_model
from engine.metrics import RayExporter
from engine.secret import application_secret
from prometheus_client import REGISTRY
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from router.app import FrontendSettings, build_openai_app
from router.core_client import ClusterCoreClient
from router.internals import check_internals
from router.membership import Membership
from router.metrics import RouterMetrics
from router.policies import POLICIES

GAUGE_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    frontend: FrontendSettings
    policy: str = "p2c"


@serve.ingress()
class Router:
    """One router replica. Owns its pools, its membership and its metrics."""

    def __init__(
        self, settings: RouterSettings, prefill: DeploymentHandle, decode: DeploymentHandle
    ) -> None:
        # The handles tie the pools to this application; requests go over channels of our own.
        check_internals()
        self._settings = settings
        self._tasks: list[asyncio.Task[None]] = []

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        frontend = self._settings.frontend
        frontend = dataclasses.replace(frontend, model=resolve_model(frontend.model))
        application = serve.get_replica_context().app_name
        self._metrics = RouterMetrics(REGISTRY)
        self._core = ClusterCoreClient(POLICIES[self._settings.policy], self._metrics)
        self._membership = Membership(
            (self._core.prefill, self._core.decode),
            application=application,
            secret=application_secret(application),
        )
        self._tasks = [
            asyncio.create_task(RayExporter(REGISTRY).run()),
            asyncio.create_task(self._refresh_gauges()),
        ]
        return await build_openai_app(frontend, self._core)

    async def _refresh_gauges(self) -> None:
        while True:
            self._metrics.observe_pools((self._core.prefill, self._core.decode))
            await asyncio.sleep(GAUGE_INTERVAL_S)
