"""vLLM's OpenAI app over the two pools.

Owns the making of the app; every route, check and answer in it is vLLM's own.
"""

from argparse import Namespace
from types import SimpleNamespace
from unittest import mock

from starlette.types import ASGIApp
from vllm.config import VllmConfig
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.executor.abstract import Executor

from engine.arguments import engine_args
from router.admission import WaitsForReplicas
from router.answers import TellsRoute
from router.core_client import ClusterCoreClient
from router.disconnect import EndsByItself
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


def frontend_args(settings: FrontendSettings) -> Namespace:
    """vLLM's server arguments with their defaults, and ours where they differ."""
    args: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    engine = engine_args(settings.model, settings.options)
    values = {name: getattr(engine, name) for name in settings.options} | dict(settings.frontend)
    for name, value in values.items():
        setattr(args, name, value)
    args.model = settings.model
    args.served_model_name = [settings.served_name]
    args.disable_log_stats = True
    return args


async def build_openai_app(
    settings: FrontendSettings, core: ClusterCoreClient, health: Health
) -> ASGIApp:
    """The app that answers clients."""
    args = frontend_args(settings)
    options = {**settings.options, "served_model_name": [settings.served_name]}
    config = engine_args(settings.model, options).create_engine_config()
    core.prefills_whole_prompt = not config.model_config.is_hybrid
    llm = ClusterLLM(config, core)
    app = build_app(args, TASKS, config.model_config)
    app.router.routes.insert(0, health.route())
    # vLLM's error handler stops its server when the engine is dead; ours is Serve's to stop.
    app.state.server = SimpleNamespace(should_exit=False)
    await init_app_state(llm, app.state, args, TASKS)
    held = WaitsForReplicas(TellsRoute(app), core.ready, core.limits.max_wait_s)
    return EndsByItself(BodyLimit(held, settings.max_body_bytes))
