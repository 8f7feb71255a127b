"""Memory that two processes move between them, cut into descriptors as a KV cache is into blocks.

Owns the layout of both sides. Never moves a byte.
"""

import random
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`size_bytes` in pieces of `descriptor_bytes` each."""

    size_bytes: int
    descriptor_bytes: int

    @property
    def num_descriptors(self) -> int:
        return self.size_bytes // self.descriptor_bytes

    @property
    def here(self) -> tuple[int, ...]:
        """The descriptors that are moved, by number, on the side that measures."""
        return self._order(seed=1)

    @property
    def there(self) -> tuple[int, ...]:
        """Their counterparts on the other side."""
        return self._order(seed=2)

    def _order(self, *, seed: int) -> tuple[int, ...]:
        # As in a cache that has been in use: next to nothing lies next to its successor.
        numbers = list(range(self.num_descriptors))
        random.Random(seed).shuffle(numbers)
        return tuple(numbers)


def cases(sizes: list[int], descriptors: list[int]) -> tuple[Case, ...]:
    """Every size that is made of whole descriptors."""
    return tuple(
        Case(size_bytes=size, descriptor_bytes=descriptor)
        for descriptor in descriptors
        for size in sizes
        if size >= descriptor and size % descriptor == 0
    )


def new_memory(num_bytes: int, device: torch.device, *, seed: int) -> torch.Tensor:
    """Bytes that are all backed by memory, and other ones for another seed."""
    words = torch.arange(seed, seed + num_bytes // 8, dtype=torch.int64, device=device)
    return words.view(torch.uint8)


def address_of(memory: torch.Tensor) -> int:
    return int(memory.data_ptr())


def pieces(memory: torch.Tensor, case: Case) -> torch.Tensor:
    """Shape (descriptors of the whole memory, bytes of one)."""
    whole = memory.numel() // case.descriptor_bytes * case.descriptor_bytes
    return memory[:whole].view(-1, case.descriptor_bytes)


def size_text(num_bytes: int) -> str:
    """`64 KiB`, `1 MiB`."""
    return f"{num_bytes >> 20} MiB" if num_bytes >= 1 << 20 else f"{num_bytes >> 10} KiB"
