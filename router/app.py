"""vLLM's OpenAI app over the two pools.

Owns the making of the app; every route, check and answer in it is vLLM's own.
"""

import logging
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp
from vllm.config import VllmConfig
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.renderers.chat_utils import load_chat_template
from vllm.renderers.hf import HfRenderer

from router.api_keys import ApiKeyMiddleware
from router.cancellation import CancellationShield
from router.client_headers import ClientHeadersMiddleware
from router.client_templates import ClientTemplates
from router.clients import ClientIdentityMiddleware
from router.cluster_llm import ClusterLLM
from router.core_client import ClusterCoreClient
from router.errors import RouterInternalsChanged
from router.first_errors import stop_at_first_errors
from router.frontend import frontend_args
from router.frontend_config import front_end_config, has_drafts
from router.grammar_check import GrammarCheck
from router.limits import BodyLimitMiddleware, HeaderLimitMiddleware
from router.loop_validation import compile_nothing_in_the_loop
from router.route_header import RouteHeaderMiddleware
from router.sandbox.process import SandboxProcess, zygote_arguments
from router.sandbox.queue import Sandbox
from router.settings import FrontendSettings

TASKS = ("generate",)
_ONE_ENGINES = (
    "/scale_elastic_ep",
    "/is_scaling_elastic_ep",
    "/inference/v1/abort_requests",
)
"""Paths that change one vLLM server: the cluster has its own scaling, and whoever knows an id, or
guesses it, would end another client's request, where the router is the same by chance."""
Layer = Callable[[ASGIApp], ASGIApp]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontEnd:
    """vLLM's front end over a core client, before it has an app."""

    settings: FrontendSettings
    args: Namespace
    config: VllmConfig
    llm: ClusterLLM
    sandbox: SandboxProcess
    """Not started yet."""

    def is_served(self) -> bool:
        """Whether it still hands out what engines compute."""
        return not self.llm.errored

    def request_ids(self) -> Iterable[str]:
        """Of the requests that it waits for."""
        waiting: Iterable[str] = self.llm.output_processor.request_states
        return waiting


def make_front_end(settings: FrontendSettings, client: ClusterCoreClient) -> FrontEnd:
    """vLLM's front end for a configuration.

    Raises:
        ValueError, TypeError, KeyError: vLLM's own checks of it.
    """
    args = frontend_args(settings)
    options = {**settings.options, "served_model_name": [settings.served_name]}
    config = front_end_config(settings.model, options)
    send_images_whole(config)
    process = SandboxProcess(zygote_arguments(settings.model, options))
    sandbox = Sandbox(process, settings.sandbox)
    compile_nothing_in_the_loop()
    llm = ClusterLLM(
        config,
        client,
        client_priority=settings.client_priority,
        max_prompt_logprobs=settings.limits.max_prompt_logprobs,
        grammars=GrammarCheck(sandbox),
    )
    # Of this vLLM's front end asks only whether it is there; the draft itself is the engines'.
    llm.input_processor.speculative_config = has_drafts(options) or config.speculative_config
    if args.trust_request_chat_template and isinstance(llm.renderer, HfRenderer):
        ClientTemplates(llm.renderer, load_chat_template(args.chat_template), sandbox).install()
    return FrontEnd(settings=settings, args=args, config=config, llm=llm, sandbox=process)


async def build_openai_app(front_end: FrontEnd, routes: Iterable[Route]) -> ASGIApp:
    """The app that answers clients; `routes` go before vLLM's own."""
    args = front_end.args
    level = logging.root.level
    app = build_app(args, TASKS, front_end.config.model_config)
    # What vLLM imports for some hosting services raises it: our warnings would not be seen.
    logging.root.setLevel(level)
    app.router.routes[:] = [
        *routes,
        *(each for each in app.router.routes if getattr(each, "path", None) not in _ONE_ENGINES),
    ]
    stop_at_first_errors(app)
    # vLLM's error handler stops its server when the engine is dead; ours is Serve's to stop.
    app.state.server = SimpleNamespace(should_exit=False)
    await init_app_state(front_end.llm, app.state, args, TASKS)
    front_end.sandbox.start()
    return layered(app, front_end.settings)


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
    needs_key = _taken(app, AuthenticationMiddleware, ApiKeyMiddleware, is_needed=has_keys)
    layers: list[Layer] = [
        CancellationShield,  # A request that Serve ends, ends in the engines too.
        ClientHeadersMiddleware,  # From here on they are the client's, not Serve's.
        partial(ClientIdentityMiddleware, has_keys=has_keys),
        cors,  # On refusals too.
        HeaderLimitMiddleware,  # 431
        needs_key,  # 401, before a body is read.
        partial(
            BodyLimitMiddleware, limits=settings.limits
        ),  # 408, 413; and 400 for what is in it.
        RouteHeaderMiddleware,  # The status and the route of a stream; errors of a bounded length.
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
