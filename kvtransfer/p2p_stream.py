"""Blocks through a link, in chunks: one is copied while another travels.

Owns the two buffers of one end of a link. Never decides what may be sent.
"""

import torch

from kvtransfer.p2p_link import Link, Wait
from kvtransfer.p2p_pages import BlockIds, Chunk, KVPages

_NUM_BUFFERS = 2


class BlockStream:
    """One end of a pair's link, and the staging buffers at it. One thread uses it."""

    def __init__(self, link: Link, pages: KVPages) -> None:
        self._link, self._pages = link, pages
        size = max(link.chunk_bytes, *pages.page_bytes)
        with link.stream():
            self._buffers = [
                torch.empty(size, dtype=torch.uint8, device=link.device)
                for _ in range(_NUM_BUFFERS)
            ]

    def send(self, block_ids: BlockIds) -> None:
        """Returns when the blocks may be overwritten. Raises PairBroken."""
        waits: list[Wait] = []
        with self._link.stream():
            indices = self._pages.indices(block_ids)
            for number, chunk in enumerate(self._plan(block_ids)):
                if number >= _NUM_BUFFERS:
                    waits[number - _NUM_BUFFERS]()
                buffer = self._buffers[number % _NUM_BUFFERS]
                self._pages.gather(chunk, indices, buffer)
                waits.append(self._link.send(buffer[: chunk.num_bytes]))
            for wait in waits[-_NUM_BUFFERS:]:
                wait()
            self._link.finish()

    def receive(self, block_ids: BlockIds) -> int:
        """Fills the blocks, and returns their bytes. Raises PairBroken."""
        chunks = self._plan(block_ids)
        waits: list[Wait] = []
        with self._link.stream():
            indices = self._pages.indices(block_ids)
            for number, chunk in enumerate(chunks):
                while len(waits) < min(number + _NUM_BUFFERS, len(chunks)):
                    expected = chunks[len(waits)]
                    buffer = self._buffers[len(waits) % _NUM_BUFFERS]
                    waits.append(self._link.receive(buffer[: expected.num_bytes]))
                waits[number]()
                self._pages.scatter(chunk, indices, self._buffers[number % _NUM_BUFFERS])
            self._link.finish()
        return sum(chunk.num_bytes for chunk in chunks)

    @property
    def is_stuck(self) -> bool:
        """Whether the thread that uses it is lost."""
        return self._link.is_stuck

    def close(self) -> None:
        """When it returns no block is read or written any more. Raises PairStuck."""
        self._link.close()

    def _plan(self, block_ids: BlockIds) -> tuple[Chunk, ...]:
        num_blocks = [len(of_group) for of_group in block_ids]
        return self._pages.plan(num_blocks, chunk_bytes=self._link.chunk_bytes)
