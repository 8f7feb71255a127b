"""The router's Serve deployment: the ingress of the application."""

import asyncio
import dataclasses
from dataclasses import dataclass

from prometheus_client import REGISTRY
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from engine.demo_model import resolve_model
from engine.metrics import RayExporter
from engine.secret import application_secret
from router.app import FrontendSettings, build_openai_app
from router.core_client import ClusterCoreClient
from router.internals import check_internals
from router.membership import Membership
from router.metrics import PoolMetrics, RouterMetrics
from router.policies import POLICIES


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

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        frontend = self._settings.frontend
        frontend = dataclasses.replace(frontend, model=resolve_model(frontend.model))
        application = serve.get_replica_context().app_name
        policy = POLICIES[self._settings.policy]
        self._core = ClusterCoreClient(policy, RouterMetrics(REGISTRY))
        self._membership = Membership(
            (self._core.prefill, self._core.decode),
            application=application,
            secret=application_secret(application),
        )
        PoolMetrics((self._core.prefill, self._core.decode), REGISTRY)
        self._exporter = asyncio.create_task(RayExporter(REGISTRY).run())
        return await build_openai_app(frontend, self._core)
