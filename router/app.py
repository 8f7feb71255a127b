"""vLLM's OpenAI app over the two pools.

Owns the making of the app; every route, check and answer in it is vLLM's own.
"""

import logging
from collections.abc import Callable
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any
from unittest import mock

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp
from vllm.config import VllmConfig
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.exceptions import GracefulHTTPError
from vllm.renderers.chat_utils import load_chat_template
from vllm.renderers.hf import HfRenderer
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import RequestOutputCollector
from vllm.v1.executor.abstract import Executor

from engine.arguments import engine_args
from router.admission import WaitsForReplicas
from router.answers import TellsRoute
from router.client_templates import ClientTemplates
from router.core_client import ClusterCoreClient
from router.disconnect import EndsByItself
from router.errors import SandboxUnavailable
from router.frontend import frontend_args
from router.grammar_check import GrammarCheck
from router.health import Health
from router.limits import BodyLimit
from router.loop_validation import check_lengths, compile_nothing_in_the_loop
from router.sandbox.process import SandboxProcess, zygote_arguments
from router.sandbox.queue import Sandbox
from router.settings import FrontendSettings

TASKS = ("generate",)


class ClusterLLM(AsyncLLM):  # type: ignore[misc]
    """vLLM's front end with the cluster where its engine would be."""

    def __init__(self, config: VllmConfig, core: ClusterCoreClient, grammars: GrammarCheck) -> None:
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
        self._grammars = grammars
        # With it, constraints would be compiled in the loop, where they hold everybody up.
        self.input_processor.structured_outputs_config = None

    async def add_request(
        self, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> RequestOutputCollector:
        if isinstance(params, SamplingParams):
            check_lengths(params)
            if params.structured_outputs is not None:
                await self._check_grammar(params.structured_outputs)
        return await super().add_request(request_id, prompt, params, *args, **kwargs)

    async def _check_grammar(self, constraint: StructuredOutputsParams) -> None:
        try:
            await self._grammars.apply(constraint)
        except SandboxUnavailable as error:
            raise GracefulHTTPError(str(error), HTTPStatus.SERVICE_UNAVAILABLE) from None


async def build_openai_app(
    settings: FrontendSettings, core: ClusterCoreClient, health: Health
) -> ASGIApp:
    """The app that answers clients."""
    args = frontend_args(settings)
    options = {**settings.options, "served_model_name": [settings.served_name]}
    config = engine_args(settings.model, options).create_engine_config()
    core.prefills_whole_prompt = not config.model_config.is_hybrid
    process = SandboxProcess(zygote_arguments(settings.model, options))
    sandbox = Sandbox(process, settings.sandbox)
    compile_nothing_in_the_loop()
    llm = ClusterLLM(config, core, GrammarCheck(sandbox))
    if args.trust_request_chat_template and isinstance(llm.renderer, HfRenderer):
        ClientTemplates(llm.renderer, load_chat_template(args.chat_template), sandbox).install()
    level = logging.root.level
    app = build_app(args, TASKS, config.model_config)
    # What vLLM imports for some hosting services raises it: our warnings would not be seen.
    logging.root.setLevel(level)
    app.router.routes.insert(0, health.route())
    # vLLM's error handler stops its server when the engine is dead; ours is Serve's to stop.
    app.state.server = SimpleNamespace(should_exit=False)
    await init_app_state(llm, app.state, args, TASKS)
    process.start()
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
