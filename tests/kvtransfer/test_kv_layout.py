"""The layout check, property by property."""

from dataclasses import replace
from typing import Any

import pytest

from kvtransfer.layout import KVLayout, mismatch

LAYOUT = KVLayout(
    protocol=1,
    vllm_version="0.32.0",
    connector_version=14,
    transfer_mode="pull",
    model="demo",
    dtype="torch.float32",
    kv_cache_dtype="auto",
    num_layers=4,
    num_kv_heads=2,
    head_size=64,
    block_size=128,
    kv_cache_layout="LBHNC",
    attention_backend="CPU_ATTN",
    hybrid_kv_cache=True,
    tensor_parallel_size=1,
    reads_repeated_heads=False,
)


@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 1), (4, 2), (2, 4)])
def test_the_same_layout_fits(sizes: tuple[int, int]) -> None:
    layout = replace(LAYOUT, num_kv_heads=8)
    prefill, decode = (replace(layout, tensor_parallel_size=size) for size in sizes)
    assert mismatch(prefill=prefill, decode=decode) is None


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"block_size": 32}, "block size is 128 on prefill and 32 on decode"),
        (
            {"dtype": "torch.bfloat16"},
            "dtype is torch.float32 on prefill and torch.bfloat16 on decode",
        ),
        (
            {"model": "other", "num_layers": 8},
            "model is demo on prefill and other on decode; "
            "number of layers is 4 on prefill and 8 on decode",
        ),
    ],
)
def test_every_difference_is_named(changed: dict[str, Any], line: str) -> None:
    assert mismatch(prefill=LAYOUT, decode=replace(LAYOUT, **changed)) == line


@pytest.mark.parametrize(
    ("sizes", "num_kv_heads", "reason"),
    [
        ((2, 3), 8, "neither is a multiple of the other"),
        ((4, 1), 2, "vLLM cannot merge 2 KV heads kept more than once"),
    ],
)
def test_tensor_parallelism_that_vllm_cannot_bridge(
    sizes: tuple[int, int], num_kv_heads: int, reason: str
) -> None:
    layout = replace(LAYOUT, num_kv_heads=num_kv_heads)
    prefill, decode = (replace(layout, tensor_parallel_size=size) for size in sizes)
    assert mismatch(prefill=prefill, decode=decode) == (
        f"tensor parallelism is {sizes[0]} on prefill and {sizes[1]} on decode, and {reason}"
    )
