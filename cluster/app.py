"""The Serve application: `import_path: cluster.app:build`.

Turns a cluster config into three deployments. Never touches a request.
"""

from collections.abc import Mapping
from typing import Any

from decode.server import DecodeServer
from engine.server import EngineSettings
from prefill.server import PrefillServer
from ray import serve
from ray.serve import Application
from router.app import FrontendSettings
from router.server import Router, RouterSettings

from cluster.config import ClusterConfig, PoolConfig, parse_args

CPU_ENGINE_ENV = {
    # One thread per engine, left to the scheduler of the operating system: engines share cores.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def build(args: Mapping[str, Any]) -> Application:
    """The application for a config's `args`.

    Raises:
        ConfigError: in one line, the field that is wrong and what it may be.
    """
    config = parse_args(dict(args))
    prefill = _pool_app(PrefillServer, config, "prefill")
    decode = _pool_app(DecodeServer, config, "decode")
    settings = RouterSettings(
        frontend=FrontendSettings(
            model=config.model,
            served_name=config.public_name,
            options=config.pool_engine("decode"),
            max_body_bytes=int(config.router.max_body_mib * 2**20),
        ),
        policy=config.router.policy,
    )
    router = serve.deployment(
        Router,  # type: ignore[arg-type]
        name="router",
        num_replicas=config.router.replicas,
        # Requests wait in the engines' queues, where the policies see them, not in front of us.
        max_ongoing_requests=100_000,
        ray_actor_options={
            "num_cpus": config.router.cpus,
            "runtime_env": {"env_vars": CPU_ENGINE_ENV},
        },
    )
    return router.bind(settings, prefill, decode)


def _pool_app(server: type, config: ClusterConfig, name: str) -> Application:
    pool: PoolConfig = getattr(config, name)
    settings = EngineSettings(
        model=config.model,
        options=config.pool_engine(name),  # type: ignore[arg-type]
        lease_s=config.transfer.lease_s,
        backends=config.transfer.backends,
    )
    env = dict(pool.env)
    if pool.gpus == 0:
        env = CPU_ENGINE_ENV | {"VLLM_CPU_KVCACHE_SPACE": f"{pool.kv_cache_gib:g}"} | env
    actor_options: dict[str, Any] = {
        "num_cpus": pool.cpus,
        "num_gpus": pool.gpus,
        "resources": pool.resources,
        "runtime_env": {"env_vars": env},
    }
    if pool.labels:
        actor_options["label_selector"] = pool.labels
    deployment = serve.deployment(
        server,
        name=name,
        num_replicas=pool.replicas,
        ray_actor_options=actor_options,
        health_check_period_s=2.0,
        health_check_timeout_s=settings.stall_timeout_s + 5.0,
    )
    return deployment.bind(settings)
