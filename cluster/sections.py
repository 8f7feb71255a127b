"""The sections of the cluster's configuration: their fields, defaults and descriptions.

Owns what a section may say by itself; cluster.config joins them and checks one against another.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from cluster.owned_options import OWNED_ENGINE_OPTIONS


def _engine_option(name: str) -> str:
    if name in OWNED_ENGINE_OPTIONS:
        raise ValueError(f"may not be set here: {OWNED_ENGINE_OPTIONS[name]}")
    return name


def _resource(name: str) -> str:
    if name in ("CPU", "GPU"):
        raise ValueError(f"may not be set here: use {name.lower()}s of the pool")
    if not name:
        raise ValueError("a resource must have a name")
    return name


def _selector(text: str) -> str:
    # Ray takes `in(a, b)` and then looks for a label " b".
    return re.sub(r",\s+", ",", text)


def _router_resource(name: str) -> str:
    if name == "GPU":
        raise ValueError("may not be set here: a router computes nothing")
    if name == "CPU":
        raise ValueError("may not be set here: use cpus of the router")
    return _resource(name)


def _name(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError(f"{text!r} is not a printable text")
    return text


def _variable(name: str) -> str:
    if not name or "=" in name or "\0" in name:
        raise ValueError("is not the name of an environment variable")
    if name.startswith("VLLM_DP_"):
        raise ValueError("may not be set here: raise the pool's replicas instead")
    return name


def _variable_value(value: str) -> str:
    if "\0" in value:
        raise ValueError("a NUL may not be in an environment variable")
    return value


def _absolute(path: str) -> str:
    if not path.startswith("/"):
        raise ValueError("must be an absolute path")
    return path


def _once(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError("a backend is named twice")
    return names


def _ordered(ends: tuple[int, int]) -> tuple[int, int]:
    if ends[0] > ends[1]:
        raise ValueError("the least must come first")
    return ends


MAX_REPLICAS = 100_000
"""Of one deployment; Serve counts in 32 bits, and a typing error is found sooner."""

MAX_NODES = 1_000
"""Of one engine."""

EngineOptions = dict[Annotated[str, AfterValidator(_engine_option)], Any]
Name = Annotated[str, Field(min_length=1), AfterValidator(_name)]
Variables = dict[
    Annotated[str, AfterValidator(_variable)], Annotated[str, AfterValidator(_variable_value)]
]
Priority = Annotated[int, Field(ge=-1_000_000, le=1_000_000, strict=True)]
ClientPriority = Annotated[tuple[Priority, Priority], AfterValidator(_ordered)]
Backends = Annotated[tuple[str, ...], AfterValidator(_once)]
AbsolutePath = Annotated[str, AfterValidator(_absolute)]
_Amount = Annotated[float, Field(gt=0)]
Resources = dict[Annotated[str, AfterValidator(_resource)], _Amount]
Labels = dict[str, Annotated[str, AfterValidator(_selector)]]
RouterResources = dict[Annotated[str, AfterValidator(_router_resource)], _Amount]


class Section(BaseModel):
    """Takes no field that it does not know, and no value of another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class PoolConfig(Section):
    """One pool of vLLM engines: how many, on what, with which options."""

    replicas: int = Field(
        default=1,
        ge=1,
        le=MAX_REPLICAS,
        description="Engines in this pool; with `max_replicas`, how many it starts with.",
    )
    max_replicas: int | None = Field(
        default=None,
        ge=1,
        le=MAX_REPLICAS,
        description="Largest size of the pool, which is then scaled with the traffic. Unset, its "
        "size is fixed.",
    )
    min_replicas: int = Field(
        default=1,
        ge=0,
        description="Smallest size of the pool. With 0 it is stopped when it is idle, and requests "
        "wait while it starts again.",
    )
    warm_replicas: int = Field(
        default=0,
        ge=0,
        description="Replicas kept beyond what the traffic needs, for requests that cannot wait "
        "for a start.",
    )
    gpus: int = Field(
        default=0,
        ge=0,
        description="GPUs of each replica, one per rank: tensor_parallel_size times "
        "pipeline_parallel_size. 0 runs the engine on the CPU.",
    )
    nodes: int = Field(
        default=1,
        ge=1,
        le=MAX_NODES,
        description="Nodes that the engine of each replica spans, for a model that no node can "
        "hold. Its ranks, and the `gpus`, `cpus` and `resources` of the replica, are divided "
        "evenly among them.",
    )
    cpus: float = Field(default=0.25, gt=0, description="Ray CPUs reserved for each replica.")
    resources: Resources = Field(
        default_factory=dict,
        description="Custom Ray resources reserved for each replica, e.g. `{fast_nic: 1}`.",
    )
    labels: Labels = Field(
        default_factory=dict,
        description="Ray node labels that a replica's nodes must have, e.g. "
        "`{ray.io/accelerator-type: H100}`.",
    )
    engine: EngineOptions = Field(
        default_factory=dict,
        description="vLLM engine arguments for this pool, over the shared `engine`.",
    )
    kv_cache_gib: float = Field(
        default=1.0,
        ge=0.001,
        le=1_000_000,
        description="GiB of KV cache of each replica on CPU. On GPUs set "
        "`engine.gpu_memory_utilization` instead.",
    )
    env: Variables = Field(
        default_factory=dict, description="Environment variables of each replica."
    )

    @property
    def resources_per_node(self) -> dict[str, float]:
        """What a replica reserves on each of its nodes, by Ray's names."""
        whole = {"GPU": self.gpus, "CPU": self.cpus, **self.resources}
        return {name: amount / self.nodes for name, amount in whole.items()}


class TransferConfig(Section):
    """How KV blocks get from prefill to decode."""

    connector: Literal["nixl", "nccl"] = Field(
        default="nixl",
        description="What transfers the KV blocks: reads by NIXL, or messages over NCCL between "
        "GPUs and over Gloo between CPUs.",
    )
    backends: Backends = Field(
        default=("UCX",),
        strict=False,
        min_length=1,
        description="NIXL backends, in order of preference.",
    )
    shared_memory: Literal["auto", "never"] = Field(
        default="auto",
        description="On CPUs, with `nixl`: `auto` lets decode copy KV from a prefill engine of its "
        "host through shared memory; NIXL then carries the handshake, the leases and the "
        "notifications. With `never`, as in the demo, and for pairs that cannot share memory, NIXL "
        "carries the KV too.",
    )
    read_timeout_s: float = Field(
        default=5.0,
        ge=0.1,
        le=3600,
        description="Seconds that a prefill engine may be silent while decode reads its blocks, "
        "beyond what the bytes in flight take, before decode probes it. After as long again "
        "without a response, decode gives the read up and recomputes the blocks.",
    )
    progress_delay_us: int | None = Field(
        default=None,
        ge=0,
        le=1_000_000,
        description="Poll interval of NIXL's progress thread in microseconds; between polls it "
        "waits for events. With 0 it polls all the time and uses a core. If unset, 10,000 on CPUs "
        "and NIXL's own 0 on GPUs.",
    )
    lease_s: float = Field(
        default=30.0,
        ge=1,
        description="Seconds that prefill keeps the KV blocks of a finished prompt for a decode "
        "replica that does not ask for them.",
    )


class RouterConfig(Section):
    """The OpenAI endpoint in front of the two pools."""

    replicas: int = Field(
        default=1, ge=1, le=MAX_REPLICAS, description="Routers, each serving the whole API."
    )
    cpus: float = Field(default=0.25, gt=0, description="Ray CPUs reserved for each router.")
    resources: RouterResources = Field(
        default_factory=dict,
        description="Custom Ray resources reserved for each router, e.g. `{front_node: 1}`.",
    )
    labels: Labels = Field(
        default_factory=dict,
        description="Ray node labels that a router's node must have. It needs no GPU.",
    )
    policy: Literal["p2c", "least_work", "round_robin", "random"] = Field(
        default="p2c",
        description="Routing policy. `p2c`: the replica that is predicted to finish first, of all, "
        "or of 64 picked at random where there are more and several routers. `least_work`: always "
        "of all. `round_robin`: each in turn. `random`. A cached prefix counts as the seconds that "
        "it saves.",
    )
    local_prefill: Literal["auto", "never"] = Field(
        default="auto",
        description="Whether decode may prefill a prompt itself. `auto`: where the second token is "
        "predicted to come sooner that way and decode's step stays within `slo.itl_s`, or, by "
        "chunked prefill, where prefill would miss `slo.ttft_s`. `never`, as in the demo: prefill "
        "computes every prompt that it can.",
    )
    admission: Literal["queue", "refuse"] = Field(
        default="queue",
        description="What happens to a request that is predicted to miss `slo.ttft_s`, or "
        "`slo.itl_s` at the end of its prefill: it queues, or is refused with status 429 and "
        "`Retry-After`.",
    )
    max_queued: int | None = Field(
        default=None,
        ge=1,
        description="Requests without a first token that one router may hold; one more gets "
        "status 429. No limit if unset.",
    )
    queue_timeout_s: float | None = Field(
        default=None,
        gt=0,
        description="Seconds that a request may wait for its first token; then it gets status 503. "
        "No limit if unset.",
    )
    max_body_mib: float = Field(
        default=8.0,
        ge=1e-6,
        le=1_000_000,
        description="Largest request body in MiB; a larger one gets status 413.",
    )
    max_bodies_mib: float = Field(
        default=1024.0,
        ge=1e-6,
        le=1_000_000,
        description="MiB that the bodies of all unanswered requests of one router may have "
        "together, at least `max_body_mib`; one more gets status 503.",
    )
    receive_timeout_s: float = Field(
        default=120.0,
        gt=0,
        description="Seconds that a request's body may take to arrive; then it gets status 408.",
    )
    max_choices: int = Field(
        default=1024,
        ge=1,
        description="Prompts of one request times its `n`; more get status 400.",
    )
    max_prompt_logprobs: int = Field(
        default=100_000,
        ge=0,
        description="Log probabilities of its prompts' tokens that one request may ask for, tokens "
        "times `prompt_logprobs` and one; more get status 400. A router sends no other response "
        "while it formats one with many.",
    )
    max_connections: int = Field(
        default=4096,
        ge=1,
        le=1_000_000,
        description="Client connections that HAProxy holds, with two file descriptors each; more "
        "wait. For `pdserve up`; elsewhere set `RAY_SERVE_HAPROXY_MAXCONN` before `ray start`.",
    )
    client_priority: ClientPriority = Field(
        default=(-10, 10),
        strict=False,
        description="The lowest and the highest `priority` that a client may ask for; other values "
        "are clamped.",
    )
    compile_limit_s: float = Field(
        default=5.0,
        ge=0.01,
        le=3600,
        description="CPU seconds that the check of a client's grammar, JSON schema, regular "
        "expression or chat template may take, in a sandbox process, before an engine sees it; one "
        "that takes more gets status 400.",
    )
    compile_memory_mib: float = Field(
        default=512.0,
        ge=16,
        le=1_000_000,
        description="MiB of memory that this check may take.",
    )
    frontend: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of vLLM's API server, e.g. `{enable_auto_tool_choice: true, "
        "tool_call_parser: hermes}`. Where it takes a list, a single text is a list of one.",
    )

    @property
    def api_key(self) -> str | None:
        """One that clients may use, where they need one."""
        keys = self.frontend.get("api_key")
        if isinstance(keys, str):
            return keys
        return str(keys[0]) if keys else None


class TlsConfig(Section):
    """Certificates with which the nodes know each other."""

    certificate: AbsolutePath = Field(
        description="PEM file of a node's certificate, at the same path on every node. With this "
        "section, channels between routers and replicas and the KV handshakes use mutual TLS; the "
        "KV itself is not encrypted, see SECURITY.md. New connections use files that have changed, "
        "without a restart."
    )
    key: AbsolutePath = Field(description="PEM file of its private key.")
    ca: AbsolutePath = Field(
        description="PEM file of the authority that has signed the certificates of all nodes."
    )


class NetworkConfig(Section):
    """The connections between routers and replicas."""

    tls: TlsConfig | None = Field(default=None, description="Encrypts them.")


class RecoveryConfig(Section):
    """What is done for requests whose engine dies, hangs or leaves."""

    max_moves: int = Field(
        default=3, ge=0, description="How often one request may fail over to another engine."
    )
    max_wait_s: float = Field(
        default=120.0,
        gt=0,
        description="Seconds that a request waits for a pool that has no live replica; then it "
        "gets status 503.",
    )
    stall_timeout_s: float = Field(
        default=10.0,
        gt=0,
        description="Seconds without a message from a replica, or without a response of its "
        "engine, after which its requests fail over.",
    )
    drain_s: float = Field(
        default=30.0,
        ge=0,
        description="Seconds that a draining replica has to finish its requests; those that are "
        "left then fail over. A draining router breaks off what is left.",
    )


class SloConfig(Section):
    """What the cluster is measured against."""

    ttft_s: float = Field(
        default=0.5, gt=0, description="Target for the time to first token, in seconds."
    )
    itl_s: float = Field(
        default=0.05, gt=0, description="Target for the inter-token latency, in seconds."
    )
    percentile: float = Field(
        default=90.0,
        gt=0,
        lt=100,
        description="Share of requests, in percent, that must meet each of the two.",
    )


class ScalingConfig(Section):
    """When pools with `max_replicas` grow and shrink. How far is decided from the traffic."""

    interval_s: float = Field(default=5.0, ge=0.5, description="Seconds between two decisions.")
    up_delay_s: float = Field(
        default=0.0,
        ge=0,
        description="Seconds for which more replicas must have been needed before they start.",
    )
    down_delay_s: float = Field(
        default=30.0,
        ge=0,
        description="Seconds for which fewer replicas must have been enough, and since the last "
        "change, before the pool shrinks. Longer after each time that it had to grow again soon.",
    )
    look_back_s: float = Field(
        default=600.0,
        ge=10,
        description="Seconds of past traffic that a smaller pool must be predicted to have served "
        "within the targets.",
    )
    idle_s: float = Field(
        default=300.0,
        gt=0,
        description="Seconds without a request after which a pool with `min_replicas: 0` is "
        "stopped.",
    )
    expected_start_s: float = Field(
        default=60.0,
        gt=0,
        description="Seconds that a replica takes to start, until one was measured.",
    )
