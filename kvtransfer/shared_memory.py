"""KV caches in memory that other processes of the host can map.

Owns the move of an engine's KV cache into such memory, what a peer must be told of it, and how the
peer maps it. Never copies a block.
"""

import fcntl
import mmap
import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from kvtransfer.errors import NotShareable


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedMemory:
    """Where an engine's worker keeps its KV, for peers on its host."""

    boot_id: str
    """Of the host's kernel: process ids mean nothing under another one."""
    pid: int
    fd: int
    name: str
    """Never used twice: tells the memory from whatever else has that number elsewhere."""
    address: int
    """In the worker that owns it, as its NIXL descriptors have it."""
    num_bytes: int
    agent_name: str
    """The worker's NIXL agent."""


def share(views: Iterable[torch.Tensor], agent_name: str) -> SharedMemory:
    """Moves the one allocation behind these views into shared memory, where it is all zeros.

    To be called while it holds nothing. The same tensors show the new memory, which lasts as long
    as the process or a peer that maps it. Raises NotShareable, and leaves everything as it was,
    where there is not one allocation on the CPU or something else has a view of it too.
    """
    tensors = _with_bases(views)
    devices = {tensor.device.type for tensor in tensors}
    addresses = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    if devices != {"cpu"} or len(addresses) != 1:
        raise NotShareable(f"it has {len(addresses)} allocations on {', '.join(sorted(devices))}")
    num_bytes = tensors[0].untyped_storage().nbytes()
    name = f"pdserve-kv-{secrets.token_hex(8)}"
    try:
        fd, memory = _allocate(name, num_bytes)
    except OSError as error:
        raise NotShareable(str(error)) from error
    before: Any = StorageWeakRef(tensors[0].untyped_storage())  # type: ignore[no-untyped-call]
    _point(tensors, memory.untyped_storage())
    if not before.expired():
        _point(tensors, torch.UntypedStorage._new_with_weak_ptr(before.cdata))
        os.close(fd)
        raise NotShareable("something beside the model's layers has a view of it")
    # Every page now, and not in the first requests; only now, when the old ones are free.
    memory.zero_()
    return SharedMemory(
        boot_id=_boot_id(),
        pid=os.getpid(),
        fd=fd,
        name=name,
        address=memory.data_ptr(),
        num_bytes=num_bytes,
        agent_name=agent_name,
    )


def is_on_this_host(memory: SharedMemory) -> bool:
    """Whether it is worth trying to map a peer's memory."""
    return memory.boot_id == _boot_id()


def map_shared(memory: SharedMemory) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A peer's memory as bytes to be read, mapped as long as the array or a view of it lives.

    It outlives the peer. Takes tenths of a second for each GiB. Raises NotShareable where it cannot
    be mapped: another user or another namespace of processes.
    """
    path = f"/proc/{memory.pid}/fd/{memory.fd}"
    try:
        # In another namespace this may be anything, a device or a pipe: looked at before it is
        # opened, and again because the process may have become another one in between.
        _check(path, memory)
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            _check(f"/proc/self/fd/{fd}", memory)
            mapped = mmap.mmap(fd, memory.num_bytes, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
    except OSError as error:
        raise NotShareable(str(error)) from error
    _prefer_huge_pages(mapped)
    contents = np.frombuffer(mapped, dtype=np.uint8)
    # Pages that are new to this process would slow the first copies down to less than NIXL's.
    contents[:: mmap.PAGESIZE].max()
    return contents


def _check(path: str, memory: SharedMemory) -> None:
    is_named = os.readlink(path) == f"/memfd:{memory.name} (deleted)"
    if not is_named or os.stat(path).st_size != memory.num_bytes:
        raise NotShareable(f"process {memory.pid} is another one here")


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _allocate(name: str, num_bytes: int) -> tuple[int, torch.Tensor]:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, num_bytes)
        # Were it to shrink, a peer that reads it would die.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        mapped = mmap.mmap(fd, num_bytes)
    except OSError:
        os.close(fd)
        raise
    _prefer_huge_pages(mapped)
    return fd, torch.frombuffer(mapped, dtype=torch.uint8)


def _prefer_huge_pages(mapped: mmap.mmap) -> None:
    with suppress(OSError):  # A kernel without them.
        mapped.madvise(mmap.MADV_HUGEPAGE)


def _with_bases(views: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Each tensor once, and those that autograd keeps behind a view."""
    tensors: dict[int, torch.Tensor] = {}
    for view in views:
        tensors[id(view)] = view
        if (base := view._base) is not None:
            tensors[id(base)] = base
    return list(tensors.values())


def _point(tensors: Iterable[torch.Tensor], storage: torch.UntypedStorage) -> None:
    with torch.inference_mode():
        for tensor in tensors:
            tensor.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
