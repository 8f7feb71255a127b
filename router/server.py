"""The router's Serve deployment: the ingress of the application.

A light shell: Serve imports it to build the application, where vLLM would cost ten seconds.
"""

from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from router.settings import RouterSettings


@serve.ingress()
class Router:
    """One router replica, as Serve sees it."""

    def __init__(
        self, settings: RouterSettings, prefill: DeploymentHandle, decode: DeploymentHandle
    ) -> None:
        # The handles tie the pools to this application; requests go over channels of our own.
        self._settings = settings
        self._assembly: Any = None

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        from router.assembly import Assembly

        self._assembly = Assembly(self._settings)
        app: ASGIApp = await self._assembly.build()
        return app

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve passes on to the scaling policies, as router.traffic counts it."""
        if self._assembly is None:
            return {}
        report: dict[str, float] = self._assembly.scaling_report()
        return report
