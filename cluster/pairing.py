"""Which engine options a prefill and a decode engine must have in common, to be a pair.

Owns the lists; knows no vLLM. What vLLM would do with a difference it says late, or never: half of
an answer from one model, half from another.
"""

from collections.abc import Mapping
from typing import Any

_KV = ("block_size", "dtype", "kv_cache_dtype", "kv_cache_dtype_skip_layers", "max_model_len")
_MODEL = (
    "code_revision",
    "config_format",
    "enable_lora",
    "hf_config_path",
    "hf_overrides",
    "load_format",
    "max_lora_rank",
    "model_class_overrides",
    "model_weights",
    "quantization",
    "quantization_config",
    "revision",
    "tokenizer",
    "tokenizer_mode",
    "tokenizer_revision",
)
_ANSWERS = (
    "generation_config",
    "limit_mm_per_prompt",
    "logits_processors",
    "logprobs_mode",
    "max_logprobs",
    "mm_processor_kwargs",
    "override_generation_config",
    "reasoning_config",
    "reasoning_parser",
    "reasoning_parser_plugin",
    "skip_tokenizer_init",
    "structured_outputs_config",
    "use_fp64_gumbel",
)
SAME_IN_BOTH_POOLS = (*_KV, *_MODEL, *_ANSWERS)
"""Options that shape the KV cache, the weights, or the answers; the router has decode's."""

_ALIASES = {"half": "float16", "float": "float32"}
_DRAFTS_WITHOUT_WEIGHTS = ("ngram", "[ngram]", "ngram_gpu", "suffix")
_SAME_DRAFT = ("method", "model", "revision", "code_revision", "quantization")


def pair_problem(prefill: Mapping[str, Any], decode: Mapping[str, Any]) -> str | None:
    """The option that the pools must share and do not, in one line; None where they are a pair."""
    for option in SAME_IN_BOTH_POOLS:
        values = [_set(options.get(option)) for options in (prefill, decode)]
        if values[0] != values[1]:
            told = ["unset" if value is None else str(value) for value in values]
            return (
                f"engine.{option}: {told[0]} in prefill and {told[1]} in decode must be the "
                "same; set it once, in the shared engine"
            )
    drafts = [_draft(options.get("speculative_config")) for options in (prefill, decode)]
    if drafts[0] != drafts[1]:
        return (
            "engine.speculative_config: a draft with weights has KV of its own, so both pools have "
            "the same draft or neither has one; set it in the shared engine"
        )
    lengths = [_mtp_length(options.get("speculative_config")) for options in (prefill, decode)]
    if lengths[0] != lengths[1]:
        return (
            f"engine.speculative_config.num_speculative_tokens: {lengths[0]} in prefill and "
            f"{lengths[1]} in decode must be the same with MTP, whose modules have KV of their own "
            "and are as many; set it in the shared engine"
        )
    return None


def _set(value: object) -> object:
    """None for what is vLLM's own default wherever it is allowed, one name for one thing."""
    if value is False or value == "auto":
        return None
    return _ALIASES.get(value, value) if isinstance(value, str) else value


def _draft(speculative: object) -> tuple[Any, ...] | None:
    """What identifies the draft model, where there is one with weights."""
    if not isinstance(speculative, Mapping):
        return None
    options = _options(speculative)
    if (options.get("method") or options.get("model")) in _DRAFTS_WITHOUT_WEIGHTS:
        return None
    return tuple(options.get(name) for name in _SAME_DRAFT)


def _mtp_length(speculative: object) -> Any:
    """How many tokens modules of the model itself draft, where it is these that do."""
    if not isinstance(speculative, Mapping):
        return None
    options = _options(speculative)
    is_mtp = str(options.get("method")).endswith("mtp")
    return options.get("num_speculative_tokens") if is_mtp else None


def _options(speculative: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(name).replace("-", "_"): value for name, value in speculative.items()}
