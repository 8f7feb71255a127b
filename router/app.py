"""vLLM's OpenAI app over the two pools.

Owns the making of the app; every route, check and answer in it is vLLM's own.
"""

import logging
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp
from vllm.config import VllmConfig
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.renderers.chat_utils import load_chat_template
from vllm.renderers.hf import HfRenderer

from router.answers import TellsRoute
from router.auditor import Auditor
from router.client_headers import RestoresHeaders
from router.client_templates import ClientTemplates
from router.clients import KnowsClient
from router.cluster_llm import ClusterLLM
from router.core_client import ClusterCoreClient
from router.disconnect import EndsByItself
from router.errors import RouterInternalsChanged
from router.frontend import frontend_args
from router.frontend_config import front_end_config, has_drafts
from router.grammar_check import GrammarCheck
from router.health import Health
from router.keys import NeedsKey
from router.limits import BodyLimit, HeaderLimit
from router.loop_validation import compile_nothing_in_the_loop
from router.sandbox.process import SandboxProcess, zygote_arguments
from router.sandbox.queue import Sandbox
from router.settings import FrontendSettings

TASKS = ("generate",)
_ONE_ENGINES = ("/scale_elastic_ep", "/is_scaling_elastic_ep")
"""Paths that change the engine of one vLLM server; the cluster has its own scaling."""
Layer = Callable[[ASGIApp], ASGIApp]


async def build_openai_app(
    settings: FrontendSettings, core: ClusterCoreClient, health: Health, auditor: Auditor
) -> ASGIApp:
    """The app that answers clients."""
    args = frontend_args(settings)
    options = {**settings.options, "served_model_name": [settings.served_name]}
    config = front_end_config(settings.model, options)
    send_images_whole(config)
    process = SandboxProcess(zygote_arguments(settings.model, options))
    sandbox = Sandbox(process, settings.sandbox)
    compile_nothing_in_the_loop()
    llm = ClusterLLM(
        config,
        core,
        client_priority=settings.client_priority,
        max_prompt_logprobs=settings.limits.max_prompt_logprobs,
        grammars=GrammarCheck(sandbox),
    )
    # Of this vLLM's front end asks only whether it is there; the draft itself is the engines'.
    llm.input_processor.speculative_config = has_drafts(options) or config.speculative_config
    if args.trust_request_chat_template and isinstance(llm.renderer, HfRenderer):
        ClientTemplates(llm.renderer, load_chat_template(args.chat_template), sandbox).install()
    health.is_served = lambda: not llm.errored
    auditor.front_end = lambda: llm.output_processor.request_states
    level = logging.root.level
    app = build_app(args, TASKS, config.model_config)
    # What vLLM imports for some hosting services raises it: our warnings would not be seen.
    logging.root.setLevel(level)
    app.router.routes[:] = [
        health.route(),
        auditor.route(),
        *(each for each in app.router.routes if getattr(each, "path", None) not in _ONE_ENGINES),
    ]
    # vLLM's error handler stops its server when the engine is dead; ours is Serve's to stop.
    app.state.server = SimpleNamespace(should_exit=False)
    await init_app_state(llm, app.state, args, TASKS)
    process.start()
    return layered(app, settings)


def send_images_whole(config: VllmConfig) -> None:
    """As where several front ends share an engine: what an engine has seen, none of them knows.

    One front end with an engine of its own sends an image once and then only its hash, which an
    engine that has not seen it cannot follow.
    """
    config.parallel_config._api_process_count = 2


def layered(app: FastAPI, settings: FrontendSettings) -> ASGIApp:
    """vLLM's app with what a request passes before it, and its answer after it."""
    cors = _taken(app, CORSMiddleware, CORSMiddleware, is_needed=True)
    has_keys = bool(app.state.args.api_key)
    needs_key = _taken(app, AuthenticationMiddleware, NeedsKey, is_needed=has_keys)
    layers: list[Layer] = [
        EndsByItself,  # A request that Serve ends, ends in the engines too.
        RestoresHeaders,  # From here on they are the client's, not Serve's.
        partial(KnowsClient, has_keys=has_keys),
        cors,  # On refusals too.
        HeaderLimit,  # 431
        needs_key,  # 401, before a body is read.
        partial(BodyLimit, limits=settings.limits),  # 408, 413; and 400 for what is in it.
        TellsRoute,  # The status and the route of a stream; errors of a bounded length.
    ]
    whole: ASGIApp = app
    for layer in reversed(layers):
        whole = layer(whole)
    return whole


def _taken(app: FastAPI, kind: type, ours: Callable[..., ASGIApp], *, is_needed: bool) -> Layer:
    """Takes a middleware of vLLM's out of the app, to be put around more than the app, as ours.

    A browser hides an answer without the CORS header from its page, so every answer must have it.
    Nothing is put around where vLLM has none.

    Raises:
        RouterInternalsChanged: vLLM has none where one is needed.
    """
    middlewares: list[Any] = app.user_middleware
    found = [each for each in middlewares if each.cls is kind]
    if is_needed and not found:
        raise RouterInternalsChanged(f"vLLM's app has no {kind.__name__}")
    for each in found:
        middlewares.remove(each)
    app.middleware_stack = None  # may be built already; the app builds it anew when it is called
    return partial(ours, *found[0].args, **found[0].kwargs) if found else lambda inner: inner
