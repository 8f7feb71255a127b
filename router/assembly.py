"""Puts a router together: pools, membership, metrics, and vLLM's app in front of them."""

import asyncio
import dataclasses
from collections.abc import Mapping

import ray
from prometheus_client import REGISTRY
from ray import serve
from ray.exceptions import RayError
from starlette.types import ASGIApp

from engine.metrics import RayExporter
from engine.models import resolve_model
from engine.secret import application_secret
from kvtransfer.tls import new_tls
from router.app import build_openai_app, make_front_end
from router.auditor import Auditor
from router.core import build_core
from router.core_client import ClusterCoreClient
from router.engine_failures import EngineFailures
from router.errors import FrontEndStalled
from router.health import Health
from router.internals import check_internals
from router.membership import Membership
from router.metrics import PoolMetrics, RouterMetrics, unready_pairs_gauge
from router.nodes import dead_nodes
from router.policies import POLICIES
from router.scaling_report import ScalingReport
from router.serve_list import ServeList
from router.serve_messages import one_line
from router.settings import RouterSettings
from router.traffic import TrafficMeter

SERVE_TIMEOUT_S = 5.0
"""How long `/health` waits for what Serve's controller knows."""


class Assembly:
    """The parts of one router. Owns them for as long as the replica lives."""

    def __init__(self, settings: RouterSettings) -> None:
        check_internals()
        self._application = application = serve.get_replica_context().app_name
        traffic = TrafficMeter(settings.routing.slo)
        metrics = RouterMetrics(REGISTRY)
        self._core = build_core(
            POLICIES[settings.policy],
            metrics,
            settings.recovery,
            traffic=traffic,
            settings=settings.routing,
            num_routers=settings.num_routers,
        )
        pools = self._core.pools
        PoolMetrics(pools, REGISTRY)
        unready = unready_pairs_gauge(REGISTRY)
        unready.set_function(lambda: len(self._core.pairs))
        traffic.predict(self._core.prefill.cost.prefill, self._core.decode.cost.decode)
        secret = application_secret(application)
        router_id = ray.get_runtime_context().get_worker_id()
        self.engine_failures = EngineFailures(REGISTRY)
        model = resolve_model(settings.frontend.model)
        self._front_end = make_front_end(
            dataclasses.replace(settings.frontend, model=model), ClusterCoreClient(self._core)
        )
        self._membership = Membership(
            pools,
            self._core.pairs,
            router_id=router_id,
            secret=secret,
            tls=new_tls(settings.tls),
            stall_timeout_s=settings.recovery.stall_timeout_s,
            engine_failures=self.engine_failures,
            dead_nodes=dead_nodes,
        )
        self._serve_list = ServeList(
            (pool.name for pool in pools),
            application=application,
            router_id=router_id,
            changed=self._membership.listed,
        )
        self._exporter = asyncio.create_task(RayExporter(REGISTRY).run())
        self._stall_timeout_s = settings.recovery.stall_timeout_s

    def check_front_end(self) -> None:
        """Raises FrontEndStalled where nobody hands out what the engines compute."""
        if not self._front_end.is_served():
            raise FrontEndStalled("vLLM's output handler has ended")
        if (unread_s := self._core.outputs.unread_s()) > self._stall_timeout_s:
            raise FrontEndStalled(f"vLLM's output handler has read nothing for {unread_s:.0f} s")

    def scaling_report(self) -> ScalingReport:
        """What the scaling policies are told."""
        return self._core.scaling_report()

    async def build(self) -> ASGIApp:
        """The app that answers clients."""
        health = Health(
            self._core.pools,
            self.engine_failures,
            self._starting,
            is_served=self._front_end.is_served,
            pairs=self._core.pairs,
        )
        auditor = Auditor(self._core, self._front_end.request_ids)
        return await build_openai_app(self._front_end, (health.route(), auditor.route()))

    async def _starting(self) -> Mapping[str, str]:
        """What Serve says of each deployment that does not run as it should."""
        try:
            async with asyncio.timeout(SERVE_TIMEOUT_S):
                status = await asyncio.to_thread(serve.status)
        except (TimeoutError, RayError) as error:
            return {"serve": f"Serve's controller does not answer: {error!r}"}
        application = status.applications.get(self._application)
        deployments = application.deployments if application is not None else {}
        lines = {name: one_line(each.message) for name, each in deployments.items()}
        return {name: line for name, line in lines.items() if line is not None}
