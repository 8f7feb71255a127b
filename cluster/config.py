"""The cluster's configuration: its sections together, and what must fit between them.

Owns the `args` of the Serve application. Never imports vLLM or Ray: cluster.serve_file reads the
file around the args, cluster.engine_options knows which options vLLM has.
"""

from collections.abc import Mapping
from typing import Any

import pydantic
from pydantic import Field

from cluster.pairing import pair_problem
from cluster.parallelism import Parallelism, transfer_problem
from cluster.parsing import parse_model
from cluster.scaling import PoolLimits
from cluster.sections import (
    EngineOptions,
    Name,
    NetworkConfig,
    PoolConfig,
    RecoveryConfig,
    RouterConfig,
    ScalingConfig,
    Section,
    SloConfig,
    TransferConfig,
)
from kvtransfer.phase import PHASES, Phase

_OTHERS_RANKS = ("ray", "external_launcher")
"""Executors of vLLM's whose ranks others start, or that reserve GPUs beside the replica's own."""
_OF_ONE_NODE = ("VLLM_HOST_IP",)
"""Environment variables that differ from node to node."""


class ClusterConfig(Section):
    """The `args` of the Serve application: one model, two pools, a router."""

    model: Name = Field(
        default="demo",
        description="A folder or hub id that vLLM loads, or a built-in one: `smollm2`, a small "
        "chat model, or `demo`, a tiny one with random weights.",
    )
    served_name: Name | None = Field(
        default=None,
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
    network: NetworkConfig = Field(
        default=NetworkConfig(), description="Between routers and replicas."
    )
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

    def pool(self, name: Phase) -> PoolConfig:
        return self.prefill if name == "prefill" else self.decode

    def pool_engine(self, name: Phase) -> dict[str, Any]:
        """The vLLM engine arguments of a pool: its own over the shared ones."""
        return {**self.engine, **self.pool(name).engine}

    def parallelism(self, name: Phase) -> Parallelism:
        """How an engine of a pool is divided among ranks."""
        options = self.pool_engine(name)
        return Parallelism(
            tensor=options.get("tensor_parallel_size", 1),
            pipeline=options.get("pipeline_parallel_size", 1),
        )

    def num_ranks(self, name: Phase) -> int:
        """Worker processes of one replica of a pool."""
        parallelism = self.parallelism(name)
        return parallelism.tensor * parallelism.pipeline

    def limits(self, name: Phase) -> PoolLimits:
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

    def initial_replicas(self, name: Phase) -> int:
        """How many a pool starts with."""
        pool = self.pool(name)
        if pool.max_replicas is None or "replicas" in pool.model_fields_set:
            return pool.replicas
        return max(1, pool.min_replicas)

    @property
    def scales(self) -> bool:
        """Whether a pool has a size that changes."""
        return any(self.pool(name).max_replicas is not None for name in PHASES)

    @pydantic.model_validator(mode="after")
    def _check_across_sections(self) -> "ClusterConfig":
        for name in PHASES:
            self._check_parallelism(name)
            self._check_sizes(name)
        self._check_budget()
        if self.transfer.connector == "nccl" and "backends" in self.transfer.model_fields_set:
            raise ValueError("transfer.backends: are of nixl; transfer.connector nccl has none")
        problem = pair_problem(*(self.pool_engine(name) for name in PHASES)) or transfer_problem(
            self.transfer.connector,
            prefill=self.parallelism("prefill"),
            decode=self.parallelism("decode"),
        )
        if problem is not None:
            raise ValueError(problem)
        return self

    def _check_sizes(self, name: Phase) -> None:
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
        limits = {name: self.limits(name) for name in PHASES}
        for numbers, what in (
            ({name: limits[name].min_replicas for name in PHASES}, "the smallest pools need"),
            ({name: self.initial_replicas(name) for name in PHASES}, "the pools start with"),
        ):
            needed = sum(numbers[name] * limits[name].gpus_per_replica for name in PHASES)
            if self.gpu_budget < needed:
                raise ValueError(
                    f"gpu_budget: {self.gpu_budget} is less than the {needed} that {what}: "
                    f"{numbers['prefill']} prefill and {numbers['decode']} decode replicas"
                )

    def _check_parallelism(self, name: Phase) -> None:
        pool, options = self.pool(name), self.pool_engine(name)
        for option in ("tensor_parallel_size", "pipeline_parallel_size"):
            size = options.get(option, 1)
            if type(size) is not int or size < 1:
                section = f"{name}.engine" if option in pool.engine else "engine"
                raise ValueError(f"{section}.{option}: {size!r} is not a whole number from 1")
        if (executor := options.get("distributed_executor_backend")) in _OTHERS_RANKS:
            own = "distributed_executor_backend" in pool.engine
            section = f"{name}.engine" if own else "engine"
            raise ValueError(
                f"{section}.distributed_executor_backend: {executor} would have ranks outside of "
                "the replica; its ranks are processes of its own nodes, so leave it out"
            )
        if pool.nodes > 1:
            self._check_nodes(name)
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
        if not pool.gpus and options.get("kv_cache_memory_bytes") is not None:
            raise ValueError(
                f"{name}.engine.kv_cache_memory_bytes: is for pools on GPUs; set "
                f"{name}.kv_cache_gib instead"
            )

    def _check_nodes(self, name: Phase) -> None:
        pool, num_ranks = self.pool(name), self.num_ranks(name)
        if num_ranks % pool.nodes:
            raise ValueError(
                f"{name}.nodes: {pool.nodes} does not divide {num_ranks}, its engine's "
                "tensor_parallel_size times pipeline_parallel_size: each node has as many ranks"
            )
        if (executor := self.pool_engine(name).get("distributed_executor_backend", "mp")) != "mp":
            raise ValueError(
                f"{name}.nodes: {pool.nodes} does not go with distributed_executor_backend "
                f"{executor}; only mp, which is what it is if left out, spans nodes"
            )
        for variable in _OF_ONE_NODE:
            if variable in pool.env:
                raise ValueError(
                    f"{name}.env.{variable}: would be the same on each of {name}.nodes, "
                    f"{pool.nodes}; each takes its own from Ray"
                )


def parse_args(args: Mapping[str, Any]) -> ClusterConfig:
    """The config in a Serve application's `args`.

    Raises:
        ConfigError: one line that names the field and what it may be.
    """
    return parse_model(ClusterConfig, args)
