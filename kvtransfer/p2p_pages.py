"""An engine's KV cache as pages of bytes, and the order in which blocks of it travel.

Owns the views of the cache, the gathering of blocks into a chunk and their scattering. Never sends
anything. Both sides of a pair have the same layout, so that a chunk means the same to both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

BlockIds = Sequence[Sequence[int]]
"""The blocks of a request, for each KV cache group that is transferred."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """One layer's cache, bytes of shape (blocks, bytes of a block). `group` owns its block ids."""

    pages: torch.Tensor
    group: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Blocks `begin` to `end` of a region's group, at `offset` bytes in a chunk."""

    region: int
    begin: int
    end: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """What travels in one message."""

    pieces: tuple[Piece, ...]
    num_bytes: int


def plan_chunks(
    page_bytes: Sequence[int], num_blocks: Sequence[int], *, chunk_bytes: int
) -> tuple[Chunk, ...]:
    """Packs `num_blocks[r]` pages of `page_bytes[r]` bytes of each region r, in order.

    Chunks hold whole pages, at most `chunk_bytes` of them but at least one page.
    """
    chunks: list[Chunk] = []
    pieces: list[Piece] = []
    offset = 0
    for region, (page, num) in enumerate(zip(page_bytes, num_blocks, strict=True)):
        begin = 0
        while begin < num:
            if pieces and offset + page > chunk_bytes:
                chunks.append(Chunk(pieces=tuple(pieces), num_bytes=offset))
                pieces, offset = [], 0
            end = min(num, begin + max(1, (chunk_bytes - offset) // page))
            pieces.append(Piece(region=region, begin=begin, end=end, offset=offset))
            offset += (end - begin) * page
            begin = end
    if pieces:
        chunks.append(Chunk(pieces=tuple(pieces), num_bytes=offset))
    return tuple(chunks)


class KVPages:
    """The regions of one worker's cache. Owns nothing: the tensors are the engine's.

    Raises ValueError, with the layer, for a cache that does not lie in memory block by block.
    """

    def __init__(self, regions: Sequence[Region]) -> None:
        self.page_bytes = tuple(region.pages.shape[1] for region in regions)
        self._regions = _in_words(regions)
        self.device = regions[0].pages.device

    @classmethod
    def of_cache(cls, kv_caches: Mapping[str, torch.Tensor], kv_cache_config: Any) -> "KVPages":
        """Views of what vLLM's `register_kv_caches` is given."""
        group_of_layer = kv_cache_config.transfer_group_index_by_layer
        regions: dict[tuple[int, int], Region] = {}
        for layer in sorted(kv_caches):
            if layer not in group_of_layer:
                continue  # It shares another layer's cache.
            cache, group = kv_caches[layer], group_of_layer[layer]
            pages = _pages_of(layer, cache, kv_cache_config.num_blocks)
            regions.setdefault((cache.data_ptr(), group), Region(pages=pages, group=group))
        if not regions:
            raise ValueError("this model has no KV cache to transfer")
        return cls(list(regions.values()))

    def plan(self, num_blocks: Sequence[int], *, chunk_bytes: int) -> tuple[Chunk, ...]:
        """Chunks for so many blocks of each group."""
        of_regions = [num_blocks[region.group] for region in self._regions]
        return plan_chunks(self.page_bytes, of_regions, chunk_bytes=chunk_bytes)

    def owns(self, block_ids: BlockIds) -> bool:
        """Whether there are such groups and such blocks."""
        if len(block_ids) != 1 + max(region.group for region in self._regions):
            return False
        return all(
            0 <= block_id < region.pages.shape[0]
            for region in self._regions
            for block_id in block_ids[region.group]
        )

    def indices(self, block_ids: BlockIds) -> tuple[torch.Tensor, ...]:
        """The block ids of each group where the cache is, for `gather` and `scatter`."""
        return tuple(
            torch.tensor(of_group, dtype=torch.int64, device=self.device) for of_group in block_ids
        )

    def gather(self, chunk: Chunk, indices: Sequence[torch.Tensor], into: torch.Tensor) -> None:
        """Copies a chunk's blocks into the first bytes of `into`."""
        for piece in chunk.pieces:
            region = self._regions[piece.region]
            index = indices[region.group][piece.begin : piece.end]
            torch.index_select(region.pages, 0, index, out=_part(into, piece, region))

    def scatter(self, chunk: Chunk, indices: Sequence[torch.Tensor], out_of: torch.Tensor) -> None:
        """Copies a chunk's blocks from the first bytes of `out_of` to their places."""
        for piece in chunk.pieces:
            region = self._regions[piece.region]
            index = indices[region.group][piece.begin : piece.end]
            region.pages.index_copy_(0, index, _part(out_of, piece, region))


def _part(staging: torch.Tensor, piece: Piece, region: Region) -> torch.Tensor:
    num_pages, pages = piece.end - piece.begin, region.pages
    num_bytes = num_pages * pages.shape[1] * pages.element_size()
    of_piece = staging[piece.offset : piece.offset + num_bytes]
    return of_piece.view(pages.dtype).view(num_pages, pages.shape[1])


def _in_words(regions: Sequence[Region]) -> tuple[Region, ...]:
    """Scattering byte by byte on a CPU is ten times slower than by eight."""
    word_bytes = torch.int64.itemsize
    for region in regions:
        pages = region.pages
        if any(n % word_bytes for n in (pages.data_ptr(), pages.stride(0), pages.shape[1])):
            return tuple(regions)
    return tuple(
        Region(pages=region.pages.view(torch.int64), group=region.group) for region in regions
    )


def _pages_of(layer: str, cache: torch.Tensor, num_blocks: int) -> torch.Tensor:
    # The attention kernel's blocks may be smaller than the scheduler's: then several, which follow
    # each other, make one.
    if cache.ndim < 2 or cache.shape[0] % num_blocks or not cache[0].is_contiguous():
        raise ValueError(f"{layer}: the cache of this model does not lie in blocks")
    ratio = cache.shape[0] // num_blocks
    page_bytes = cache[0].nbytes * ratio
    stride_bytes = cache.stride(0) * cache.element_size()
    if ratio > 1 and stride_bytes != cache[0].nbytes:
        raise ValueError(f"{layer}: the parts of a block do not follow each other")
    return torch.empty(0, dtype=torch.uint8, device=cache.device).set_(
        cache.untyped_storage(),
        cache.storage_offset() * cache.element_size(),
        (num_blocks, page_bytes),
        (stride_bytes * ratio, 1),
    )
