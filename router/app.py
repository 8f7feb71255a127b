"""vLLM's OpenAI app over the two pools.

Owns the making of the app; every route, check and answer in it is vLLM's own.
"""

import logging
from collections.abc import Callable, Iterable
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp
from vllm.config import VllmConfig
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.executor.abstract import Executor

from engine.arguments import engine_args
from router.answers import TellsRoute
from router.auditor import Auditor
from router.client_headers import RestoresHeaders
from router.core_client import ClusterCoreClient
from router.disconnect import EndsByItself
from router.frontend import frontend_args
from router.health import Health
from router.keys import NeedsKey
from router.limits import BodyLimit, HeaderLimit
from router.settings import FrontendSettings

TASKS = ("generate",)
Layer = Callable[[ASGIApp], ASGIApp]


class ClusterLLM(AsyncLLM):  # type: ignore[misc]
    """vLLM's front end with the cluster where its engine would be."""

    def __init__(
        self, config: VllmConfig, core: ClusterCoreClient, client_priority: tuple[int, int]
    ) -> None:
        """`client_priority` are the ends of what a client may ask for."""
        self._least_priority, self._most_priority = client_priority
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

    async def add_request(self, *args: Any, priority: int = 0, **options: Any) -> Any:
        """Takes a request, at the nearest priority that its client may have."""
        allowed = min(max(priority, self._least_priority), self._most_priority)
        return await super().add_request(*args, priority=allowed, **options)


async def build_openai_app(
    settings: FrontendSettings, core: ClusterCoreClient, health: Health, auditor: Auditor
) -> ASGIApp:
    """The app that answers clients."""
    args = frontend_args(settings)
    options = {**settings.options, "served_model_name": [settings.served_name]}
    config = engine_args(settings.model, options).create_engine_config()
    core.prefills_whole_prompt = not config.model_config.is_hybrid
    send_images_whole(config)
    llm = ClusterLLM(config, core, settings.client_priority)
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
    return layered(app, settings)


def send_images_whole(config: VllmConfig) -> None:
    """As where several front ends share an engine: what an engine has seen, none of them knows.

    One front end with an engine of its own sends an image once and then only its hash, which an
    engine that has not seen it cannot follow.
    """
    config.parallel_config._api_process_count = 2


def layered(app: FastAPI, settings: FrontendSettings) -> ASGIApp:
    """vLLM's app with what a request passes before it, and its answer after it."""
    layers: list[Layer] = [
        EndsByItself,  # A request that Serve ends, ends in the engines too.
        RestoresHeaders,  # From here on they are the client's, not Serve's.
        _taken(app, CORSMiddleware, CORSMiddleware),  # On refusals too.
        HeaderLimit,  # 431
        _taken(app, AuthenticationMiddleware, NeedsKey),  # 401, before a body is read.
        partial(BodyLimit, limits=settings.limits),  # 408, 413; and 400 for what is in it.
        TellsRoute,  # The status and the route of a stream; errors of a bounded length.
    ]
    whole: ASGIApp = app
    for layer in reversed(layers):
        whole = layer(whole)
    return whole


def _taken(app: FastAPI, kind: type, ours: Callable[..., ASGIApp]) -> Layer:
    """Takes a middleware of vLLM's out of the app, to be put around more than the app, as ours.

    A browser hides an answer without the CORS header from its page, so every answer must have it.
    Nothing is put around where vLLM has none: no keys are set.
    """
    middlewares: list[Any] = app.user_middleware
    found = [each for each in middlewares if each.cls is kind]
    for each in found:
        middlewares.remove(each)
    app.middleware_stack = None  # may be built already; the app builds it anew when it is called
    return partial(ours, *found[0].args, **found[0].kwargs) if found else lambda inner: inner
