"""vLLM's OpenAI app over the two pools.

Owns the making of the app; every route, check and answer in it is vLLM's own.
"""

import logging
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any
from unittest import mock

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp
from vllm.config import VllmConfig
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.executor.abstract import Executor

from engine.arguments import engine_args
from router.admission import WaitsForReplicas
from router.answers import TellsRoute
from router.auditor import Auditor
from router.core_client import ClusterCoreClient
from router.disconnect import EndsByItself
from router.frontend import frontend_args
from router.health import Health
from router.limits import BodyLimit
from router.settings import FrontendSettings

TASKS = ("generate",)


class ClusterLLM(AsyncLLM):  # type: ignore[misc]
    """vLLM's front end with the cluster where its engine would be."""

    def __init__(self, config: VllmConfig, core: ClusterCoreClient) -> None:
        # AsyncLLM makes its engine-core client itself; there is no argument for another one.
        with mock.patch(
            "vllm.v1.engine.async_llm.EngineCoreClient.make_async_mp_client",
            return_value=core,
        ):
            super().__init__(
                vllm_config=config,
                executor_class=Executor.get_class(config),
                log_stats=False,
                log_requests=False,
            )
        self._core = core

    async def abort(self, request_id: str | Iterable[str], internal: bool = False) -> None:
        """Ends requests that nobody waits for; those that a stop string has ended are not here."""
        request_ids = [request_id] if isinstance(request_id, str) else list(request_id)
        self._core.cancel(self.output_processor.abort_requests(request_ids, internal))


async def build_openai_app(
    settings: FrontendSettings, core: ClusterCoreClient, health: Health, auditor: Auditor
) -> ASGIApp:
    """The app that answers clients."""
    args = frontend_args(settings)
    options = {**settings.options, "served_model_name": [settings.served_name]}
    config = engine_args(settings.model, options).create_engine_config()
    core.prefills_whole_prompt = not config.model_config.is_hybrid
    llm = ClusterLLM(config, core)
    health.is_served = lambda: not llm.errored
    auditor.front_end = lambda: llm.output_processor.request_states
    level = logging.root.level
    app = build_app(args, TASKS, config.model_config)
    # What vLLM imports for some hosting services raises it: our warnings would not be seen.
    logging.root.setLevel(level)
    for route in (health.route(), auditor.route()):
        app.router.routes.insert(0, route)
    # vLLM's error handler stops its server when the engine is dead; ours is Serve's to stop.
    app.state.server = SimpleNamespace(should_exit=False)
    await init_app_state(llm, app.state, args, TASKS)
    cors = take_cors(app)
    held = WaitsForReplicas(TellsRoute(app), core.ready, core.limits.max_wait_s)
    return EndsByItself(cors(BodyLimit(held, settings.max_body_bytes)))


def take_cors(app: FastAPI) -> Callable[[ASGIApp], ASGIApp]:
    """Takes vLLM's CORS middleware out of the app, to be put around more than the app.

    A browser hides an answer without its header from the page, so every answer must have it: also
    those of the middlewares around the app, and the app's own about API keys.
    """
    middlewares: list[Any] = app.user_middleware
    (cors,) = (each for each in middlewares if each.cls is CORSMiddleware)
    middlewares.remove(cors)
    app.middleware_stack = None  # may be built already; the app builds it anew when it is called
    return lambda inner: CORSMiddleware(inner, *cors.args, **cors.kwargs)
