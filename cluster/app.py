"""The Serve application: `import_path: cluster.app:build`.

Turns a cluster config into three deployments. Never touches a request.
"""

import warnings
from collections.abc import Mapping
from typing import Any, Literal

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from cluster.config import ClusterConfig, parse_args
from cluster.engine_config import start_options
from cluster.engine_options import check_engine_options
from cluster.nodes import warn_of_what_waits
from cluster.scaling_args import scaling_args
from cluster.sections import PoolConfig, RouterConfig
from engine.deployment import EngineDeployment, EngineSettings
from kvtransfer.phase import Phase
from kvtransfer.tls import TlsFiles
from router.admission import AdmissionLimits
from router.recovery import RecoveryLimits
from router.sandbox.limits import TaskLimits
from router.server import Router
from router.settings import FrontendSettings, RequestLimits, RouterSettings, RoutingSettings
from router.slo import Slo

SERVE_ENV = {
    # Serve runs our code on a second event loop by default, and every chunk of an answer crosses
    # between two threads. None of our code blocks its loop, so one will do.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_FREEZE_GC_ON_STARTUP": "1",
}

ROUTER_ENV = {
    # A router computes nothing: on every node, with a GPU or without, vLLM is the same there.
    "VLLM_TARGET_DEVICE": "cpu",
    # Around the requests that HAProxy sends straight to a router.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "router.client_headers.middlewares",
    # How long a router that leaves keeps its port open, 30 s by default: all of `drain_s`. HAProxy
    # looks every 5 s whether a router takes requests; one that comes later goes to another router.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "10",
}

ENGINE_ENV = {
    # An engine that crashes says where.
    "PYTHONFAULTHANDLER": "1",
}

CPU_ENGINE_ENV = {
    # One thread per engine, left to the scheduler of the operating system: engines share cores.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # vLLM compiles a helper of its logprobs at first use, eager or not: tens of seconds in which
    # the engine stands still, or an error where there is no C++ compiler.
    "TORCHDYNAMO_DISABLE": "1",
}


REPORT_INTERVAL_S = 1.0
"""How often routers tell the controller what they see."""
REPORTS_KEPT_S = 30.0
"""Longer than a plan's interval, so that none is missed."""


def build(args: Mapping[str, Any]) -> Application:
    """The application for a config's `args`.

    Raises:
        ConfigError: in one line, the field that is wrong and what it may be.
    """
    config = parse_args(dict(args))
    check_engine_options(config)
    warn_of_what_waits(config)
    prefill = _pool_app("prefill.server:PrefillServer", config, "prefill")
    decode = _pool_app("decode.server:DecodeServer", config, "decode")
    settings = RouterSettings(
        frontend=FrontendSettings(
            model=config.model,
            served_name=config.public_name,
            options=_front_end_options(config),
            frontend=config.router.frontend,
            limits=RequestLimits(
                max_body_bytes=int(config.router.max_body_mib * 2**20),
                max_bodies_bytes=int(
                    max(config.router.max_bodies_mib, config.router.max_body_mib) * 2**20
                ),
                max_choices=config.router.max_choices,
                max_prompt_logprobs=config.router.max_prompt_logprobs,
                receive_timeout_s=config.router.receive_timeout_s,
            ),
            client_priority=config.router.client_priority,
            sandbox=TaskLimits(
                cpu_s=config.router.compile_limit_s,
                memory_bytes=int(config.router.compile_memory_mib * 2**20),
            ),
        ),
        policy=config.router.policy,
        num_routers=config.router.replicas,
        routing=_routing(config),
        recovery=RecoveryLimits(
            max_failovers=config.recovery.max_moves,
            max_wait_s=config.recovery.max_wait_s,
            stall_timeout_s=config.recovery.stall_timeout_s,
        ),
        drain_s=config.recovery.drain_s,
        tls=_tls(config),
    )
    router = serve.deployment(
        Router,
        name="router",
        **_size(config, "router"),
        # Requests wait in the engines' queues, where the policies see them, not in front of us.
        max_ongoing_requests=100_000,
        health_check_period_s=2.0,
        health_check_timeout_s=settings.recovery.stall_timeout_s + 5.0,
        # A router that is replaced, in a config update say, keeps what waits for new engines.
        graceful_shutdown_timeout_s=config.recovery.max_wait_s + config.recovery.drain_s,
        # A line in a file for every request costs more than routing it.
        logging_config={"enable_access_log": False},
        ray_actor_options={
            "num_cpus": config.router.cpus,
            **_places(config.router),
            "runtime_env": {"env_vars": SERVE_ENV | ROUTER_ENV | CPU_ENGINE_ENV},
        },
    )
    return router.bind(settings, prefill, decode)


def _tls(config: ClusterConfig) -> TlsFiles | None:
    tls = config.network.tls
    return None if tls is None else TlsFiles(certificate=tls.certificate, key=tls.key, ca=tls.ca)


def _routing(config: ClusterConfig) -> RoutingSettings:
    router = config.router
    return RoutingSettings(
        slo=Slo(ttft_s=config.slo.ttft_s, itl_s=config.slo.itl_s),
        admission=AdmissionLimits(
            refuses=router.admission == "refuse", max_queued=router.max_queued
        ),
        local_prefill=router.local_prefill == "auto",
        queue_timeout_s=router.queue_timeout_s,
    )


def _size(config: ClusterConfig, name: Phase | Literal["router"]) -> dict[str, Any]:
    """How many replicas Serve is told to run: a number, or a policy that follows the plan."""
    if not config.scales:
        fixed = config.router.replicas if name == "router" else config.pool(name).replicas
        return {"num_replicas": fixed}
    if name == "router":
        # Its size is fixed; Serve passes on what replicas report only where it scales them.
        least = most = initial = config.router.replicas
    else:
        limits = config.limits(name)
        least, most = limits.min_replicas, limits.max_replicas
        initial = config.initial_replicas(name)
    with warnings.catch_warnings():
        # Serve means to replace metrics_interval_s by a variable that it does not read yet.
        warnings.simplefilter("ignore", DeprecationWarning)
        scaling = AutoscalingConfig(
            min_replicas=least,
            max_replicas=most,
            initial_replicas=initial,
            metrics_interval_s=REPORT_INTERVAL_S,
            look_back_period_s=REPORTS_KEPT_S,
            # The plan has delays of its own.
            upscale_delay_s=0.0,
            downscale_delay_s=0.0,
            policy=AutoscalingPolicy(
                policy_function="cluster.policy:PlannedSize", policy_kwargs=scaling_args(config)
            ),
        )
    return {"autoscaling_config": scaling}


def _front_end_options(config: ClusterConfig) -> dict[str, Any]:
    """Decode's, which answers; what cannot be asked beside drafts is refused where either has."""
    options = config.pool_engine("decode")
    drafts = config.pool_engine("prefill").get("speculative_config")
    return options if drafts is None else {"speculative_config": drafts, **options}


def _places(section: PoolConfig | RouterConfig) -> dict[str, Any]:
    """Which nodes a replica may be on, in Ray's words."""
    labels = {"label_selector": section.labels} if section.labels else {}
    return {"resources": section.resources, **labels}


def _bundles(pool: PoolConfig) -> dict[str, Any]:
    """What Serve reserves for a replica of several nodes: as much on each, all of it or nothing."""
    if pool.nodes == 1:
        return {}
    bundle = {name: amount for name, amount in pool.resources_per_node.items() if amount}
    labels = {"placement_group_bundle_label_selector": [pool.labels] * pool.nodes}
    return {
        "placement_group_bundles": [bundle] * pool.nodes,
        "placement_group_strategy": "STRICT_SPREAD",
        **(labels if pool.labels else {}),
    }


def _actor_resources(pool: PoolConfig) -> dict[str, Any]:
    """What a replica's own process takes, on its one node or the first of several."""
    if pool.nodes == 1:
        return {"num_cpus": pool.cpus, "num_gpus": pool.gpus, **_places(pool)}
    share = pool.resources_per_node
    return {"num_cpus": share.pop("CPU"), "num_gpus": share.pop("GPU"), "resources": share}


def _pool_app(server: str, config: ClusterConfig, name: Phase) -> Application:
    pool = config.pool(name)
    settings = EngineSettings(
        model=config.model,
        options=start_options(config, name),
        lease_s=config.transfer.lease_s,
        connector=config.transfer.connector,
        backends=config.transfer.backends,
        shared_memory=config.transfer.shared_memory,
        read_timeout_s=config.transfer.read_timeout_s,
        progress_delay_us=config.transfer.progress_delay_us,
        stall_timeout_s=config.recovery.stall_timeout_s,
        drain_s=config.recovery.drain_s,
        tls=_tls(config),
        nodes=pool.nodes,
    )
    env = SERVE_ENV | ENGINE_ENV | pool.env
    if pool.gpus == 0:
        env = CPU_ENGINE_ENV | env
    actor_options: dict[str, Any] = {**_actor_resources(pool), "runtime_env": {"env_vars": env}}
    deployment = serve.deployment(
        EngineDeployment,
        name=name,
        **_size(config, name),
        **_bundles(pool),
        ray_actor_options=actor_options,
        health_check_period_s=2.0,
        health_check_timeout_s=settings.stall_timeout_s + 5.0,
        # Serve ends a replica by force after this; until then ours is about its drain.
        graceful_shutdown_timeout_s=settings.drain_s + 10.0,
    )
    return deployment.bind(server, settings)
