"""vLLM's own verdict on a whole engine, where its model lies on this machine and runs on its CPU.

Owns what an engine of a pool is started with. Loads no weights and starts nothing; for engines on
GPUs, and for models that would have to be fetched, vLLM's verdict comes when they start.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pydantic

from cluster.config import ClusterConfig
from cluster.errors import ConfigError
from cluster.parsing import one_line
from kvtransfer.phase import PHASES, Phase

_ELSEWHERE = ("hf_config_path", "model_weights", "tokenizer")
"""Options that may name something to be fetched."""


def start_options(config: ClusterConfig, name: Phase) -> dict[str, Any]:
    """The vLLM engine arguments that a replica of a pool starts with, but for its KV transfer."""
    pool = config.pool(name)
    options: dict[str, Any] = {}
    if pool.gpus == 0:
        options["kv_cache_memory_bytes"] = int(pool.kv_cache_gib * 2**30)
    if name == "prefill":
        # Routers say by when each prompt must start.
        options["scheduling_policy"] = "priority"
    return options | config.pool_engine(name)


def check_whole_engines(config: ClusterConfig) -> None:
    """Has vLLM put together the configuration of each pool's engine, where it can here.

    Raises:
        ConfigError: one line with vLLM's reason.
    """
    from vllm.platforms import current_platform

    folder = _model_folder(config.model)
    if folder is None or not current_platform.is_cpu():
        return
    for name in PHASES:
        if config.pool(name).gpus == 0 and _is_here(config.pool_engine(name)):
            _check_engine(config, name, folder)


def _check_engine(config: ClusterConfig, name: Phase, folder: Path) -> None:
    from engine.arguments import engine_args
    from engine.meeting import node_options
    from kvtransfer.config import kv_transfer_config

    transfer = kv_transfer_config(
        name,
        engine_id="none",
        lease_s=int(config.transfer.lease_s),
        connector=config.transfer.connector,
        backends=config.transfer.backends,
        shared_memory=config.transfer.shared_memory,
        read_timeout_s=config.transfer.read_timeout_s,
        progress_delay_us=config.transfer.progress_delay_us,
    )
    options = {**start_options(config, name), "kv_transfer_config": transfer}
    if (num_nodes := config.pool(name).nodes) > 1:
        options |= node_options(num_nodes, node=0, host="127.0.0.1", port=1)
    section = f"{name}.engine" if config.pool(name).engine else "engine"
    try:
        with mock.patch.dict(os.environ, config.pool(name).env):
            engine_args(str(folder), options).create_engine_config()
    except pydantic.ValidationError as error:
        raise ConfigError(one_line(error, section=section)) from None
    except Exception as error:  # would end the replica's start, whatever it is
        raise ConfigError(f"{section}: {' '.join(str(error).split())}") from None


def _model_folder(model: str) -> Path | None:
    from engine.models import BUILT_IN, model_folder

    folder = model_folder(model) if model in BUILT_IN else Path(model)
    return folder if folder.is_dir() else None


def _is_here(options: Mapping[str, Any]) -> bool:
    """Whether nothing would have to be fetched beside the model."""
    draft = options.get("speculative_config") or {}
    named = [options.get(name) for name in _ELSEWHERE] + [draft.get("model")]
    return all(name is None or Path(name).exists() for name in named)
