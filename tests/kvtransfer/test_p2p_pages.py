"""Pages: every block's bytes travel once, in chunks of whole pages, to where they belong."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvtransfer.p2p_pages import KVPages, plan_chunks

NUM_BLOCKS = 7


def cache_config(*layers_of_groups: tuple[str, ...]) -> Any:
    """What of vLLM's `KVCacheConfig` is looked at."""
    return SimpleNamespace(
        num_blocks=NUM_BLOCKS,
        transfer_group_index_by_layer={
            layer: group for group, layers in enumerate(layers_of_groups) for layer in layers
        },
    )


@pytest.mark.parametrize(
    ("page_bytes", "num_blocks", "chunk_bytes", "sizes"),
    [
        pytest.param((8,), (0,), 16, [], id="nothing"),
        pytest.param((8, 8), (1, 1), 16, [16], id="regions share a chunk"),
        pytest.param((8, 8), (3, 3), 16, [16, 16, 16], id="a region ends inside a chunk"),
        pytest.param((32,), (2,), 16, [32, 32], id="a page larger than a chunk"),
        pytest.param((8, 24), (1, 2), 32, [32, 24], id="pages of two sizes"),
        pytest.param((8, 8, 8), (2, 0, 1), 64, [24], id="a group without blocks"),
    ],
)
def test_chunks_hold_every_page_once(
    page_bytes: tuple[int, ...], num_blocks: tuple[int, ...], chunk_bytes: int, sizes: list[int]
) -> None:
    chunks = plan_chunks(page_bytes, num_blocks, chunk_bytes=chunk_bytes)
    assert [chunk.num_bytes for chunk in chunks] == sizes
    planned = [
        (piece.region, block)
        for chunk in chunks
        for piece in chunk.pieces
        for block in range(piece.begin, piece.end)
    ]
    assert planned == [
        (region, block) for region, num in enumerate(num_blocks) for block in range(num)
    ]
    for chunk in chunks:
        offset = 0
        for piece in chunk.pieces:
            assert piece.offset == offset
            offset += (piece.end - piece.begin) * page_bytes[piece.region]
        assert offset == chunk.num_bytes


@pytest.mark.parametrize("kernel_blocks_of_a_block", [1, 2])
def test_what_is_gathered_here_is_scattered_there(kernel_blocks_of_a_block: int) -> None:
    shape = (NUM_BLOCKS * kernel_blocks_of_a_block, 2, 3, 4)
    caches = [{name: torch.randn(shape) for name in ("a", "b")} for _ in range(2)]
    source, target = (KVPages.of_cache(cache, cache_config(("a",), ("b",))) for cache in caches)
    source_ids, target_ids = ((1, 5, 2), (3,)), ((6, 0, 3), (4,))

    chunks = source.plan((3, 1), chunk_bytes=2 * source.page_bytes[0])
    for chunk in chunks:
        staging = torch.empty(chunk.num_bytes, dtype=torch.uint8)
        source.gather(chunk, source.indices(source_ids), staging)
        target.scatter(chunk, target.indices(target_ids), staging)

    for group, name in enumerate(("a", "b")):
        blocks = [cache[name].view(NUM_BLOCKS, -1) for cache in caches]
        for here, there in zip(source_ids[group], target_ids[group], strict=True):
            assert torch.equal(blocks[0][here], blocks[1][there])


def test_layers_of_one_allocation_are_told_apart() -> None:
    packed = torch.randn(NUM_BLOCKS, 2, 3)
    pages = KVPages.of_cache({"a": packed[:, 0], "b": packed[:, 1]}, cache_config(("a", "b")))
    (chunk,) = pages.plan((1,), chunk_bytes=1 << 20)
    staging = torch.empty(chunk.num_bytes, dtype=torch.uint8)
    pages.gather(chunk, pages.indices(((4,),)), staging)
    assert torch.equal(staging.view(torch.float32), packed[4].flatten())


def test_a_layer_that_shares_anothers_cache_is_left_out() -> None:
    cache = torch.randn(NUM_BLOCKS, 3)
    pages = KVPages.of_cache({"a": cache, "shares": cache}, cache_config(("a",)))
    assert pages.page_bytes == (12,)


@pytest.mark.parametrize(
    "cache",
    [
        pytest.param(torch.randn(2, NUM_BLOCKS, 4), id="keys, then values"),
        pytest.param(torch.randn(4 * NUM_BLOCKS), id="no blocks"),
        pytest.param(torch.randn(NUM_BLOCKS, 3, 4).transpose(1, 2), id="a torn block"),
    ],
)
def test_another_layout_is_refused_by_name(cache: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"layer\.0: the cache"):
        KVPages.of_cache({"layer.0": cache}, cache_config(("layer.0",)))


@pytest.mark.parametrize(
    ("block_ids", "owned"),
    [
        (((0, NUM_BLOCKS - 1),), True),
        (((),), True),
        (((NUM_BLOCKS,),), False),
        (((-1,),), False),
        ((), False),
        (((0,), (0,)), False),
    ],
)
def test_block_ids_of_strangers(block_ids: tuple[tuple[int, ...], ...], owned: bool) -> None:
    pages = KVPages.of_cache({"a": torch.randn(NUM_BLOCKS, 3)}, cache_config(("a",)))
    assert pages.owns(block_ids) is owned
