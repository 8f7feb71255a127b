"""The cluster's configuration: what it may say, its defaults, and how a wrong value is told.

Owns the `args` of the Serve application. Never imports vLLM or Ray: cluster.serve_file reads the
file around the args, cluster.engine_options knows which options vLLM has.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from cluster.errors import ConfigError
from cluster.parallelism import Parallelism, transfer_problem
from cluster.scaling import PoolLimits

OWNED_ENGINE_OPTIONS = {
    "model": "set by the top-level model",
    "served_model_name": "set by the top-level served_name",
    "kv_transfer_config": "set from transfer",
    "scheduler_cls": "pdserve's own lets an answer go on in another engine",
    "worker_extension_cls": "taken by pdserve's own",
    "data_parallel_size": "raise the pool's replicas instead",
}
"""Options of vLLM that this project sets itself, and where to say it instead."""

SAME_IN_BOTHPOOLS = ("max_model_len", "dtype", "block_size", "kv_cache_dtype")
"""Options that shape the KV cache or the requests both pools must be able to take."""

Pool = Literal["prefill", "decode"]
POOLS: tuple[Pool, Pool] = ("prefill", "decode")


def _engine_option(name: str) -> str:
    if name in OWNED_ENGINE_OPTIONS:
        raise ValueError(f"may not be set here: {OWNED_ENGINE_OPTIONS[name]}")
    return name


def _resource(name: str) -> str:
    if name in ("CPU", "GPU"):
        raise ValueError(f"may not be set here: use {name.lower()}s of the pool")
    return name


EngineOptions = dict[Annotated[str, AfterValidator(_engine_option)], Any]
Resources = dict[Annotated[str, AfterValidator(_resource)], Annotated[float, Field(gt=0)]]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class PoolConfig(_Section):
    """One pool of vLLM engines: how many, on what, with which options."""

    replicas: int = Field(
        default=1,
        ge=1,
        description="Engines in this pool; with `max_replicas`, how many it starts with.",
    )
    max_replicas: int | None = Field(
        default=None,
        ge=1,
        description="Lets the pool grow and shrink with the traffic, to this many at most. "
        "Unset, it keeps its size.",
    )
    min_replicas: int = Field(
        default=1,
        ge=0,
        description="As few as the pool may shrink to. With 0 it goes when nobody asks, and "
        "requests wait while it starts again.",
    )
    warm_replicas: int = Field(
        default=0,
        ge=0,
        description="Kept beyond what the traffic needs, for requests that cannot wait for a "
        "start.",
    )
    gpus: int = Field(
        default=0,
        ge=0,
        description="GPUs of each replica, one per rank: tensor_parallel_size times "
        "pipeline_parallel_size. 0 runs the engine on the CPU.",
    )
    cpus: float = Field(default=0.25, gt=0, description="Ray CPUs reserved for each replica.")
    resources: Resources = Field(
        default_factory=dict,
        description="Custom Ray resources reserved for each replica, e.g. `{fast_nic: 1}`.",
    )
    labels: dict[str, str] = Field(
        default_factory=dict,
        description="Ray node labels that a replica's node must have, e.g. "
        "`{ray.io/accelerator-type: H100}`.",
    )
    engine: EngineOptions = Field(
        default_factory=dict,
        description="vLLM engine arguments for this pool, over the shared `engine`.",
    )
    kv_cache_gib: float = Field(
        default=1.0,
        gt=0,
        description="GiB of KV cache of each replica on CPU. On GPUs set "
        "`engine.gpu_memory_utilization` instead.",
    )
    env: dict[str, str] = Field(
        default_factory=dict, description="Environment variables of each replica."
    )


class TransferConfig(_Section):
    """How KV blocks get from prefill to decode."""

    connector: Literal["nixl", "nccl"] = Field(
        default="nixl",
        description="What moves the KV blocks: reads by NIXL, or messages over NCCL between GPUs "
        "and over Gloo between CPUs.",
    )
    backends: tuple[str, ...] = Field(
        default=("UCX",), strict=False, min_length=1, description="NIXL backends, by preference."
    )
    shared_memory: Literal["auto", "never"] = Field(
        default="auto",
        description="On CPUs, with `nixl`: `auto` lets decode copy KV from a prefill of its host "
        "out of memory that both map; NIXL then carries the handshake, the leases and the "
        "notifications. `never`, as in the demo, leaves the KV to NIXL too, as every pair that "
        "cannot share memory does.",
    )
    lease_s: float = Field(
        default=30.0,
        gt=0,
        description="Seconds that prefill keeps finished blocks for a decode replica that does "
        "not ask for them.",
    )


class RouterConfig(_Section):
    """The OpenAI endpoint in front of the two pools."""

    replicas: int = Field(default=1, ge=1, description="Routers, each serving the whole API.")
    cpus: float = Field(default=0.25, gt=0, description="Ray CPUs reserved for each router.")
    policy: Literal["p2c", "least_work", "round_robin", "random"] = Field(
        default="p2c",
        description="How a replica is chosen: the one that is predicted to be done first, of all "
        "or of 64 picked at random (`p2c`) or always of all (`least_work`), in turn, or at random. "
        "What is cached of a prompt counts, in seconds.",
    )
    local_prefill: Literal["auto", "never"] = Field(
        default="never",
        description="Whether decode may read a prompt itself: `auto` where its second token is "
        "predicted to come sooner that way and decode's step stays within `slo.itl_s`.",
    )
    admission: Literal["queue", "refuse"] = Field(
        default="queue",
        description="What becomes of a request that is expected to miss `slo.ttft_s`, or "
        "`slo.itl_s` at the end of its prefill: it queues, or gets status 429 with `Retry-After`.",
    )
    max_queued: int | None = Field(
        default=None,
        ge=1,
        description="Requests without a first token that one router holds; one more gets status "
        "429. Any number if unset.",
    )
    queue_timeout_s: float | None = Field(
        default=None,
        gt=0,
        description="Seconds that a request may wait for its first token; then it gets status 503. "
        "For ever if unset.",
    )
    max_body_mib: float = Field(
        default=8.0, gt=0, description="Largest request body in MiB; a larger one gets status 413."
    )
    frontend: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of vLLM's API server, e.g. `{enable_auto_tool_choice: true, "
        "tool_call_parser: hermes}`.",
    )


class RecoveryConfig(_Section):
    """What is done for requests whose engine dies, hangs or leaves."""

    max_moves: int = Field(
        default=3, ge=0, description="How often one request is moved to another engine."
    )
    max_wait_s: float = Field(
        default=120.0,
        gt=0,
        description="Seconds that a request waits for a pool without a live replica; then it gets "
        "status 503.",
    )
    stall_timeout_s: float = Field(
        default=10.0,
        gt=0,
        description="Seconds without a sign of life after which an engine is taken for dead.",
    )
    drain_s: float = Field(
        default=30.0,
        ge=0,
        description="Seconds that a replica that leaves may take to finish what it has; what is "
        "left then is moved, and broken off where a router leaves.",
    )


class SloConfig(_Section):
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
        description="Share of requests, in percent, that must meet both.",
    )


class ScalingConfig(_Section):
    """When pools with `max_replicas` grow and shrink. How far is decided from the traffic."""

    interval_s: float = Field(default=2.0, ge=0.5, description="Seconds between two decisions.")
    up_delay_s: float = Field(
        default=0.0,
        ge=0,
        description="Seconds for which more must have been needed before replicas are started.",
    )
    down_delay_s: float = Field(
        default=60.0,
        ge=0,
        description="Seconds for which fewer must have been enough, and since the last change, "
        "before some go. Longer after each time that this was regretted.",
    )
    look_back_s: float = Field(
        default=600.0,
        ge=10,
        description="Seconds of past traffic that a smaller pool must be predicted to have held.",
    )
    idle_s: float = Field(
        default=300.0,
        gt=0,
        description="Seconds without a request after which a pool with `min_replicas: 0` goes.",
    )
    expected_start_s: float = Field(
        default=60.0, gt=0, description="Seconds that a start takes, until one was seen."
    )


class ClusterConfig(_Section):
    """The `args` of the Serve application: one model, two pools, a router."""

    model: str = Field(
        default="demo",
        min_length=1,
        description="A folder or hub id that vLLM loads, or `demo` for the small built-in model.",
    )
    served_name: str | None = Field(
        default=None,
        min_length=1,
        description="The model's name in the API; the value of `model` if unset.",
    )
    engine: EngineOptions = Field(
        default_factory=dict,
        description="vLLM engine arguments (`vllm.AsyncEngineArgs`) for both pools and the "
        "router, e.g. `max_model_len`.",
    )
    prefill: PoolConfig = Field(default=PoolConfig(), description="The prefill pool.")
    decode: PoolConfig = Field(default=PoolConfig(), description="The decode pool.")
    transfer: TransferConfig = Field(
        default=TransferConfig(), description="The path of the KV blocks."
    )
    router: RouterConfig = Field(default=RouterConfig(), description="The OpenAI endpoint.")
    recovery: RecoveryConfig = Field(
        default=RecoveryConfig(), description="When engines die, hang or leave."
    )
    slo: SloConfig = Field(default=SloConfig(), description="Latency targets.")
    gpu_budget: int | None = Field(
        default=None,
        ge=1,
        description="GPUs that both pools may use together; a replica on the CPU counts as one.",
    )
    scaling: ScalingConfig = Field(
        default=ScalingConfig(), description="When pools grow and shrink."
    )

    @property
    def public_name(self) -> str:
        """The model's name in the API."""
        return self.served_name or self.model

    def pool(self, name: Pool) -> PoolConfig:
        return self.prefill if name == "prefill" else self.decode

    def pool_engine(self, name: Pool) -> dict[str, Any]:
        """The vLLM engine arguments of a pool: its own over the shared ones."""
        return {**self.engine, **self.pool(name).engine}

    def parallelism(self, name: Pool) -> Parallelism:
        """How an engine of a pool is divided among ranks."""
        options = self.pool_engine(name)
        return Parallelism(
            tensor=options.get("tensor_parallel_size", 1),
            pipeline=options.get("pipeline_parallel_size", 1),
        )

    def num_ranks(self, name: Pool) -> int:
        """Worker processes of one replica of a pool."""
        parallelism = self.parallelism(name)
        return parallelism.tensor * parallelism.pipeline

    def limits(self, name: Pool) -> PoolLimits:
        """How large a pool may be."""
        pool = self.pool(name)
        if pool.max_replicas is None:
            fewest = most = pool.replicas
        else:
            fewest, most = pool.min_replicas, pool.max_replicas
        return PoolLimits(
            min_replicas=fewest,
            max_replicas=most,
            warm_replicas=pool.warm_replicas,
            gpus_per_replica=max(1, pool.gpus),
        )

    def initial_replicas(self, name: Pool) -> int:
        """How many a pool starts with."""
        pool = self.pool(name)
        if pool.max_replicas is None or "replicas" in pool.model_fields_set:
            return pool.replicas
        return max(1, pool.min_replicas)

    @property
    def scales(self) -> bool:
        """Whether a pool has a size that changes."""
        return any(self.pool(name).max_replicas is not None for name in POOLS)

    @pydantic.model_validator(mode="after")
    def _check_across_sections(self) -> "ClusterConfig":
        for name in POOLS:
            self._check_parallelism(name)
            self._check_sizes(name)
        self._check_budget()
        for option in SAME_IN_BOTHPOOLS:
            prefill, decode = (self.pool_engine(name).get(option, "unset") for name in POOLS)
            if prefill != decode:
                raise ValueError(
                    f"engine.{option}: {prefill} in prefill and {decode} in decode must be the "
                    "same; set it once, in the shared engine"
                )
        problem = transfer_problem(
            self.transfer.connector,
            prefill=self.parallelism("prefill"),
            decode=self.parallelism("decode"),
        )
        if problem is not None:
            raise ValueError(problem)
        return self

    def _check_sizes(self, name: Pool) -> None:
        pool = self.pool(name)
        fewest, most, given = pool.min_replicas, pool.max_replicas, pool.model_fields_set
        if most is None:
            for field in ("min_replicas", "warm_replicas"):
                if field in given:
                    raise ValueError(
                        f"{name}.{field}: is for a pool that scales; set {name}.max_replicas too"
                    )
        elif fewest > most:
            raise ValueError(
                f"{name}.min_replicas: {fewest} is more than {name}.max_replicas, {most}"
            )
        elif "replicas" in given and not fewest <= pool.replicas <= most:
            raise ValueError(
                f"{name}.replicas: {pool.replicas} is not between {name}.min_replicas and "
                f"{name}.max_replicas, {fewest} and {most}"
            )

    def _check_budget(self) -> None:
        if self.gpu_budget is None:
            return
        limits = {name: self.limits(name) for name in POOLS}
        for numbers, what in (
            ({name: limits[name].min_replicas for name in POOLS}, "the smallest pools need"),
            ({name: self.initial_replicas(name) for name in POOLS}, "the pools start with"),
        ):
            needed = sum(numbers[name] * limits[name].gpus_per_replica for name in POOLS)
            if self.gpu_budget < needed:
                raise ValueError(
                    f"gpu_budget: {self.gpu_budget} is less than the {needed} that {what}: "
                    f"{numbers['prefill']} prefill and {numbers['decode']} decode replicas"
                )

    def _check_parallelism(self, name: Pool) -> None:
        pool, options = self.pool(name), self.pool_engine(name)
        for option in ("tensor_parallel_size", "pipeline_parallel_size"):
            size = options.get(option, 1)
            if type(size) is not int or size < 1:
                section = f"{name}.engine" if option in pool.engine else "engine"
                raise ValueError(f"{section}.{option}: {size!r} is not a whole number from 1")
        if pool.gpus and pool.gpus != self.num_ranks(name):
            raise ValueError(
                f"{name}.gpus: {pool.gpus} is not {self.num_ranks(name)}, its engine's "
                "tensor_parallel_size times pipeline_parallel_size: each rank has a GPU of its own"
            )
        if pool.gpus and "kv_cache_gib" in pool.model_fields_set:
            raise ValueError(
                f"{name}.kv_cache_gib: is for pools on CPU; with gpus set "
                f"{name}.engine.gpu_memory_utilization"
            )


def parse_args(args: Mapping[str, Any]) -> ClusterConfig:
    """The config in a Serve application's `args`.

    Raises:
        ConfigError: one line that names the field and what it may be.
    """
    return parse_model(ClusterConfig, args)


Model = TypeVar("Model", bound=BaseModel)


def parse_model(model: type[Model], values: object, *, section: str = "") -> Model:
    """Validates `values`, the content of `section`.

    Raises:
        ConfigError: one line about the first wrong value.
    """
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError(_one_line(error, model, section)) from None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all if few."""
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1)
    if nearest:
        return f"did you mean {nearest[0]}?"
    return f"known are {', '.join(names)}" if len(names) <= 12 else "no known name is near it"


_EXPECTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "enum": "one of {expected}",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "less_than": "less than {lt:g}",
    "list_type": "a list",
    "literal_error": "one of {expected}",
    "model_type": "a mapping",
    "string_too_short": "a non-empty text",
    "string_type": "a text",
    "too_short": "a list of at least {min_length}",
    "tuple_type": "a list",
}
"""What a field may be, by pydantic's type of error; completes "'x' is not ..."."""


def _one_line(error: pydantic.ValidationError, model: type[BaseModel], section: str) -> str:
    first = error.errors(include_url=False)[0]
    context = dict(first.get("ctx", {}))
    # "[key]" marks a mapping's key; the key itself comes before it.
    location = [section, *(str(part) for part in first["loc"] if part != "[key]")]
    path = ".".join(part for part in location if part)
    if first["type"] == "extra_forbidden":
        *parents, name = (str(part) for part in first["loc"])
        return f"{path}: no such field; {did_you_mean(name, _fields(model, parents))}"
    if first["type"] == "value_error":
        reason = str(context["error"])
    elif first["type"] in _EXPECTED:
        if "expected" in context:
            context["expected"] = context["expected"].replace("'", "").replace(" or ", ", ")
        reason = f"{first['input']!r} is not {_EXPECTED[first['type']].format(**context)}"
    else:
        reason = first["msg"][0].lower() + first["msg"][1:]
    return " ".join((f"{path}: {reason}" if path else reason).split())


def _fields(model: type[BaseModel], path: Iterable[str]) -> list[str]:
    for name in path:
        inner = model.model_fields[name].annotation
        assert isinstance(inner, type), name
        assert issubclass(inner, BaseModel), name
        model = inner
    return list(model.model_fields)
