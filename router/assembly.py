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
from router.app import build_openai_app
from router.auditor import Auditor
from router.core_client import ClusterCoreClient
from router.engine_ends import EngineEnds
from router.errors import FrontEndStalled
from router.health import Health
from router.internals import check_internals
from router.membership import Membership
from router.metrics import PoolMetrics, RouterMetrics, unready_pairs_gauge
from router.nodes import dead_nodes
from router.policies import POLICIES
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
        self._frontend = settings.frontend
        targets = settings.targets.admission
        traffic = TrafficMeter(ttft_s=targets.ttft_s, itl_s=targets.itl_s)
        metrics = RouterMetrics(REGISTRY, traffic)
        self._core = ClusterCoreClient(
            POLICIES[settings.policy],
            metrics,
            settings.recovery,
            traffic=traffic,
            targets=settings.targets,
            num_routers=settings.num_routers,
        )
        pools = (self._core.prefill, self._core.decode)
        PoolMetrics(pools, REGISTRY)
        unready = unready_pairs_gauge(REGISTRY)
        unready.set_function(lambda: len(self._core.pairs))
        traffic.predict(self._core.prefill.cost.prefill, self._core.decode.cost.decode)
        secret = application_secret(application)
        router_id = ray.get_runtime_context().get_worker_id()
        self.engine_ends = EngineEnds(REGISTRY)
        self._health = Health(pools, self.engine_ends, self._starting, pairs=self._core.pairs)
        self._auditor = Auditor(self._core)
        self._membership = Membership(
            pools,
            self._core.pairs,
            router_id=router_id,
            secret=secret,
            tls=new_tls(settings.tls),
            stall_timeout_s=settings.recovery.stall_timeout_s,
            engine_ends=self.engine_ends,
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
        if not self._health.is_served():
            raise FrontEndStalled("vLLM's output handler has ended")
        if (unread_s := self._core.unread_s()) > self._stall_timeout_s:
            raise FrontEndStalled(f"vLLM's output handler has read nothing for {unread_s:.0f} s")

    def scaling_report(self) -> dict[str, float]:
        """What the scaling policies are told: see router.traffic."""
        return self._core.scaling_report()

    async def build(self) -> ASGIApp:
        """The app that answers clients."""
        model = resolve_model(self._frontend.model)
        frontend = dataclasses.replace(self._frontend, model=model)
        return await build_openai_app(frontend, self._core, self._health, self._auditor)

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
