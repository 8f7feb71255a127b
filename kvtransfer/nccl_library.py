"""The calls of NCCL that a pair needs, by ctypes.

Owns their signatures. Never knows what they are for. vLLM's binding has the same calls and more;
importing it imports much of vLLM, which `benchmarks.device` does without.
"""

import ctypes
import os
from typing import Any

import torch

_UNIQUE_ID_BYTES = 128
_UINT8 = 1


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * _UNIQUE_ID_BYTES),)


_MESSAGE = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_void_p,
]
_CALLS: dict[str, list[Any]] = {
    "ncclGetVersion": [ctypes.POINTER(ctypes.c_int)],
    "ncclGetUniqueId": [ctypes.POINTER(_UniqueId)],
    "ncclCommInitRank": [
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.c_int,
        _UniqueId,
        ctypes.c_int,
    ],
    "ncclSend": _MESSAGE,
    "ncclRecv": _MESSAGE,
    "ncclCommAbort": [ctypes.c_void_p],
}


class Nccl:
    """NCCL's library: torch's, or the one that vLLM's VLLM_NCCL_SO_PATH names.

    Raises RuntimeError where there is none, and where a call fails.
    """

    def __init__(self) -> None:
        name = os.environ.get("VLLM_NCCL_SO_PATH") or (
            "librccl.so.1" if torch.version.hip else "libnccl.so.2"
        )
        try:
            self._library: Any = ctypes.CDLL(name)
            for call, parameters in _CALLS.items():
                getattr(self._library, call).argtypes = parameters
        except (OSError, AttributeError) as error:
            raise RuntimeError(f"no NCCL: {error}") from None
        self._library.ncclGetErrorString.restype = ctypes.c_char_p

    @property
    def version(self) -> int:
        """As 22803 for 2.28.3."""
        number = ctypes.c_int()
        self._do("ncclGetVersion", ctypes.byref(number))
        return number.value

    def new_unique_id(self) -> bytes:
        """What the two ranks of a communicator have in common."""
        unique_id = _UniqueId()
        self._do("ncclGetUniqueId", ctypes.byref(unique_id))
        return bytes(unique_id.internal)

    def join(self, unique_id: bytes, rank: int, num_ranks: int) -> Any:
        """A communicator, once all ranks have joined: may wait for ever."""
        communicator = ctypes.c_void_p()
        same_id = _UniqueId.from_buffer_copy(unique_id)
        self._do("ncclCommInitRank", ctypes.byref(communicator), num_ranks, same_id, rank)
        return communicator

    def send(self, buffer: torch.Tensor, peer: int, communicator: Any, stream: int) -> None:
        """Queues the bytes of a buffer on a CUDA stream."""
        self._do("ncclSend", buffer.data_ptr(), buffer.nbytes, _UINT8, peer, communicator, stream)

    def receive(self, buffer: torch.Tensor, peer: int, communicator: Any, stream: int) -> None:
        """As `send`."""
        self._do("ncclRecv", buffer.data_ptr(), buffer.nbytes, _UINT8, peer, communicator, stream)

    def abort(self, communicator: Any) -> None:
        """Frees it. From any thread, but not while another begins to use it."""
        self._do("ncclCommAbort", communicator)

    def _do(self, call: str, *arguments: Any) -> None:
        result = getattr(self._library, call)(*arguments)
        if result != 0:
            raise RuntimeError(
                f"{call}: {self._library.ncclGetErrorString(result).decode(errors='replace')}"
            )
