"""Copies that ask nobody: process_vm_readv from another process, and a plain memory copy.

Owns the system call. They are the bounds that the transports are held against.
"""

import ctypes
import os
from collections.abc import Callable

import torch

from benchmarks.kv_transfer_memory import Case, address_of

_IOV_MAX = 1024  # Linux, `man 2 process_vm_readv`


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = (
    ctypes.c_int,
    ctypes.POINTER(_IoVec),
    ctypes.c_ulong,
    ctypes.POINTER(_IoVec),
    ctypes.c_ulong,
    ctypes.c_ulong,
)


def vm_read(case: Case, memory: torch.Tensor, pid: int, address: int) -> Callable[[], None]:
    """Reads a case's descriptors of process `pid`, as few calls as Linux allows.

    Raises OSError, at the call, where the process may not be read.
    """
    here = _vectors(case, address_of(memory), case.here)
    there = _vectors(case, address, case.there)

    def read() -> None:
        for mine, theirs in zip(here, there, strict=True):
            wanted = len(mine) * case.descriptor_bytes
            got = _libc.process_vm_readv(pid, mine, len(mine), theirs, len(theirs), 0)
            if got != wanted:
                error = ctypes.get_errno()
                raise OSError(error, f"process_vm_readv: {got} of {wanted}: {os.strerror(error)}")

    return read


def memory_copy(case: Case, memory: torch.Tensor) -> Callable[[], None]:
    """One copy of the whole, inside the process or the GPU, by one thread."""
    source = torch.empty(case.size_bytes, dtype=torch.uint8, device=memory.device).fill_(1)
    target = memory[: case.size_bytes]
    if memory.is_cuda:

        def copy_on_gpu() -> None:
            target.copy_(source)
            torch.cuda.synchronize(memory.device)

        return copy_on_gpu
    return lambda: _memmove(target, source)


def _memmove(target: torch.Tensor, source: torch.Tensor) -> None:
    ctypes.memmove(address_of(target), address_of(source), source.numel())


def _vectors(case: Case, address: int, numbers: tuple[int, ...]) -> list[ctypes.Array[_IoVec]]:
    return [
        (_IoVec * len(batch))(
            *(
                _IoVec(address + number * case.descriptor_bytes, case.descriptor_bytes)
                for number in batch
            )
        )
        for begin in range(0, len(numbers), _IOV_MAX)
        for batch in (numbers[begin : begin + _IOV_MAX],)
    ]
