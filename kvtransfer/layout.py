"""The layout check: may this decode engine read that prefill engine's KV, and if not, why not.

Owns the comparison. Never talks to a peer. vLLM compares a hash of much of this; a hash cannot say
what differs.
"""

from dataclasses import dataclass

PROTOCOL = 2
"""Of this package between two engines; raised when they would misunderstand each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """What two engines must have in common before one reads the other's KV."""

    protocol: int
    vllm_version: str
    connector_version: int
    transfer_mode: str
    model: str
    dtype: str
    kv_cache_dtype: str
    num_layers: int
    num_kv_heads: int
    head_size: int
    block_size: int
    kv_cache_layout: str
    attention_backend: str
    hybrid_kv_cache: bool
    tensor_parallel_size: int
    reads_repeated_heads: bool
    """vLLM can read fewer ranks than keep copies of the same heads (MLA, state-space models)."""


_SAME = {
    "protocol": "transfer protocol",
    "vllm_version": "vLLM version",
    "connector_version": "vLLM NIXL connector version",
    "transfer_mode": "transfer mode",
    "model": "model",
    "dtype": "dtype",
    "kv_cache_dtype": "KV cache dtype",
    "num_layers": "number of layers",
    "num_kv_heads": "number of KV heads",
    "head_size": "head size",
    "block_size": "block size",
    "kv_cache_layout": "KV cache layout",
    "attention_backend": "attention backend",
    "hybrid_kv_cache": "hybrid KV cache",
}


def mismatch(*, prefill: KVLayout, decode: KVLayout) -> str | None:
    """What keeps the pair apart, in one line that names every property; None where nothing does."""
    differences = [
        f"{words} is {theirs} on prefill and {ours} on decode"
        for field, words in _SAME.items()
        if (theirs := getattr(prefill, field)) != (ours := getattr(decode, field))
    ]
    if (line := _tensor_parallel_mismatch(prefill, decode)) is not None:
        differences.append(line)
    return "; ".join(differences) or None


def _tensor_parallel_mismatch(prefill: KVLayout, decode: KVLayout) -> str | None:
    sizes = (prefill.tensor_parallel_size, decode.tensor_parallel_size)
    said = f"tensor parallelism is {sizes[0]} on prefill and {sizes[1]} on decode"
    if max(sizes) % min(sizes):
        return f"{said}, and neither is a multiple of the other"
    repeats_heads = prefill.tensor_parallel_size > prefill.num_kv_heads
    if sizes[0] > sizes[1] and repeats_heads and not decode.reads_repeated_heads:
        return f"{said}, and vLLM cannot merge {prefill.num_kv_heads} KV heads kept more than once"
    return None
