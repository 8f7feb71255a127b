"""vLLM's configuration of a router: what a front end needs of its engines' options.

Owns the list of those. A router's node may have no GPU, and what vLLM checks of an engine it checks
against this machine: so ranks, weights, kernels and KV stay out, and the device is the CPU.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from vllm import AsyncEngineArgs
from vllm.config import ModelConfig, VllmConfig
from vllm.platforms import current_platform

from engine.arguments import engine_args

_MODEL = (
    "allow_deprecated_quantization",
    "code_revision",
    "config_format",
    "disable_sliding_window",
    "dtype",
    "hf_config_path",
    "hf_overrides",
    "hf_token",
    "max_model_len",
    "model_class_overrides",
    "model_impl",
    "revision",
    "served_model_name",
    "skip_tokenizer_init",
    "tokenizer",
    "tokenizer_mode",
    "tokenizer_revision",
    "trust_remote_code",
)
_ANSWERS = (
    "diffusion_config",
    "enable_prompt_embeds",
    "enable_return_routed_experts",
    "enable_trace_replay",
    "generation_config",
    "logits_processors",
    "logprobs_mode",
    "max_logprobs",
    "override_generation_config",
    "reasoning_config",
    "reasoning_parser",
    "reasoning_parser_plugin",
    "return_sampling_mask",
    "stream_interval",
    "structured_outputs_config",
    "watermark_config",
)
_LIMITS = (
    # Of what one request may ask for; not of what an engine computes at a time.
    "enable_prefix_caching",
    "kv_sharing_fast_prefill",
    "max_num_batched_tokens",
    "max_num_queued_reqs",
    "max_num_queued_tokens",
    "max_num_seqs",
)
_IMAGES = (
    "allowed_local_media_path",
    "allowed_media_domains",
    "enable_mm_embeds",
    "enable_mm_processor_stats",
    "interleave_mm_strings",
    "io_processor_plugin",
    "language_model_only",
    "limit_mm_per_prompt",
    "media_io_kwargs",
    "mm_device_do_normalize",
    "mm_hasher_algorithm",
    "mm_processor_cache_gb",
    "mm_processor_cache_type",
    "mm_processor_kwargs",
    "mm_shm_cache_max_object_size_mb",
    "renderer_num_workers",
    "video_pruning_method",
    "video_pruning_rate",
)
_ADAPTERS = (
    "default_mm_loras",
    "enable_lora",
    "enable_tower_connector_lora",
    "max_cpu_loras",
    "max_lora_rank",
    "max_loras",
)
_LOGS = (
    "collect_detailed_traces",
    "enable_log_requests",
    "log_config_file",
    "log_level",
    "logging_config",
    "otlp_traces_endpoint",
    "show_hidden_metrics_for_version",
)
FRONT_END_OPTIONS = frozenset((*_MODEL, *_ANSWERS, *_LIMITS, *_IMAGES, *_ADAPTERS, *_LOGS))
"""What vLLM's front end reads of its engine's configuration, and what that is made from."""


def front_end_args(model: str, options: Mapping[str, Any]) -> AsyncEngineArgs:
    """vLLM's arguments of a front end, from those of the engines behind it.

    From then on vLLM has a device in this process, also where its platform has none.
    """
    if current_platform.is_unspecified():
        # vLLM's build for GPUs, on a node without one: it refuses to make any configuration.
        current_platform.device_type = "cpu"
    ours: dict[str, Any] = {
        name: value for name, value in options.items() if name in FRONT_END_OPTIONS
    }
    ours["enforce_eager"] = True  # Nothing is compiled where nothing is computed.
    rest = {name: value for name, value in options.items() if name not in FRONT_END_OPTIONS}
    if rest:
        # So that the fingerprint in the answers still tells one engine from another.
        told = json.dumps(rest, sort_keys=True, default=str).encode()
        ours["additional_config"] = {"engine": hashlib.sha256(told).hexdigest()}
    return engine_args(model, ours, kind=_FrontEndArgs)


def front_end_config(model: str, options: Mapping[str, Any]) -> VllmConfig:
    """vLLM's whole configuration of a front end, wherever this runs."""
    return front_end_args(model, options).create_engine_config()


def has_drafts(options: Mapping[str, Any]) -> bool:
    """Whether the engines write by speculation, with which they cannot sample in every way."""
    return options.get("speculative_config") is not None


class _FrontEndArgs(AsyncEngineArgs):  # type: ignore[misc]
    """Of a front end, which has no weights."""

    def create_model_config(self) -> ModelConfig:
        config = super().create_model_config()
        # As in vLLM's own server that only renders: a checkpoint's quantisation is the engines'.
        config.quantization = None
        return config
