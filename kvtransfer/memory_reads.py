"""Reads of peers on the same host as what they are: copies of memory.

Owns a stand-in for NIXL's agent that copies where the peer's memory is mapped and asks NIXL where
it is not, and the thread that copies. Whoever starts a read sees no difference. Never decides
whether what was read is valid.
"""

import ctypes
import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Event
from typing import Any

import numpy as np

from kvtransfer.errors import NotShareable
from kvtransfer.shared_memory import SharedMemory, is_on_this_host, map_shared

logger = logging.getLogger(__name__)

_PIECE_BYTES = 4 << 20
"""Copied at once: a fraction of a millisecond, after which a copy that is given up stops."""

_Rows = np.ndarray[Any, np.dtype[Any]]
"""Descriptors as NIXL takes them: address, number of bytes, device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyTelemetry:
    """What NIXL's telemetry says of a read, in its names: microseconds."""

    totalBytes: int  # noqa: N815
    xferDuration: float  # noqa: N815
    postDuration: float  # noqa: N815
    descCount: int  # noqa: N815


@dataclass(frozen=True, slots=True, kw_only=True)
class _Descriptors:
    rows: _Rows
    memory_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Prepared:
    """A prepared list of descriptors: NIXL's, and what a copy needs."""

    handle: Any
    lengths: _Rows
    """Bytes of each descriptor."""
    rows: _Rows | None
    """Addresses in this process; None where it cannot be copied from or to."""
    mapped: Any = None
    """The peer's memory, which stays mapped meanwhile; None for this engine's own."""


class MemoryReads:
    """NIXL's `nixl_agent` wrapper. Owns the peers' memory that is mapped, in what it prepares."""

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        self._announced: dict[str, SharedMemory] = {}
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="kv-copy")
        self.num_bytes_made = 0
        """Of all transfers of prepared descriptors so far."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)

    def announce(self, memory: SharedMemory) -> None:
        """Before a peer's descriptors are prepared: where its memory is."""
        if is_on_this_host(memory):
            self._announced[memory.agent_name] = memory

    def get_xfer_descs(self, descriptors: Any, mem_type: str) -> _Descriptors:
        # vLLM gives an array, or a list of tuples where it reads several workers of a peer.
        return _Descriptors(rows=np.asarray(descriptors, dtype=np.uint64), memory_type=mem_type)

    def initialize_xfer(
        self, operation: str, local: _Descriptors, remote: _Descriptors, agent_name: str
    ) -> Any:
        sides = (
            self._wrapper.get_xfer_descs(each.rows, each.memory_type) for each in (local, remote)
        )
        return self._wrapper.initialize_xfer(operation, *sides, agent_name)

    def prep_xfer_dlist(self, agent_name: str | bytes, descriptors: _Descriptors) -> _Prepared:
        rows, memory_type = descriptors.rows, descriptors.memory_type
        lengths = _lengths(rows)
        handle = self._wrapper.prep_xfer_dlist(agent_name, rows, memory_type)
        if memory_type != "DRAM":
            return _Prepared(handle=handle, lengths=lengths, rows=None)
        if agent_name == "NIXL_INIT_AGENT":
            return _Prepared(handle=handle, lengths=lengths, rows=rows)
        # NIXL names a remote agent in bytes.
        peer = agent_name.decode() if isinstance(agent_name, bytes) else agent_name
        memory = self._announced.pop(peer, None)
        if memory is None:
            return _Prepared(handle=handle, lengths=lengths, rows=None)
        try:
            mapped = map_shared(memory)
            rows = _moved(rows, memory, int(mapped.ctypes.data))
        except NotShareable as reason:
            logger.warning("NIXL reads agent %s, its memory cannot be mapped: %s.", peer, reason)
            return _Prepared(handle=handle, lengths=lengths, rows=None)
        return _Prepared(handle=handle, lengths=lengths, rows=rows, mapped=mapped)

    def release_dlist_handle(self, prepared: _Prepared) -> None:
        self._wrapper.release_dlist_handle(prepared.handle)

    def make_prepped_xfer(
        self,
        operation: str,
        local: _Prepared,
        local_ids: Any,
        remote: _Prepared,
        remote_ids: Any,
        **options: Any,
    ) -> Any:
        self.num_bytes_made += int(remote.lengths[remote_ids].sum())
        if operation != "READ" or remote.mapped is None or local.rows is None:
            sides = (local.handle, local_ids, remote.handle, remote_ids)
            return self._wrapper.make_prepped_xfer(operation, *sides, **options)
        assert remote.rows is not None
        return MemoryCopy(local.rows[local_ids], remote.rows[remote_ids], remote.mapped)

    def transfer(self, handle: Any) -> Any:
        if isinstance(handle, MemoryCopy):
            return handle.start(self._copier)
        return self._wrapper.transfer(handle)

    def check_xfer_state(self, handle: Any) -> Any:
        if isinstance(handle, MemoryCopy):
            return handle.state
        return self._wrapper.check_xfer_state(handle)

    def get_xfer_telemetry(self, handle: Any) -> Any:
        if isinstance(handle, MemoryCopy):
            return handle.telemetry
        return self._wrapper.get_xfer_telemetry(handle)

    def release_xfer_handle(self, handle: Any) -> None:
        if isinstance(handle, MemoryCopy):
            handle.stop()
        else:
            self._wrapper.release_xfer_handle(handle)


class MemoryCopy:
    """One read. Begun and looked at by the engine's thread, carried out by the copier's."""

    def __init__(self, to: _Rows, source: _Rows, mapped: Any) -> None:
        self._mapped = mapped  # Not to be unmapped before the copy has ended.
        self._runs = merged(to[:, 0], source[:, 0], to[:, 1])
        self._num_bytes = int(to[:, 1].sum())
        self._given_up = Event()
        self._ended: Future[float | None] | None = None

    def start(self, copier: ThreadPoolExecutor) -> str:
        self._ended = copier.submit(self._copy, time.perf_counter())
        return "PROC"

    @property
    def state(self) -> str:
        """As NIXL has it: PROC, DONE or ERR."""
        assert self._ended is not None
        if not self._ended.done():
            return "PROC"
        return "ERR" if self._ended.cancelled() or self._ended.result() is None else "DONE"

    @property
    def telemetry(self) -> CopyTelemetry:
        """Of a copy that is done."""
        assert self._ended is not None
        seconds = self._ended.result()
        assert seconds is not None
        return CopyTelemetry(
            totalBytes=self._num_bytes,
            xferDuration=seconds * 1e6,
            postDuration=0.0,
            descCount=len(self._runs),
        )

    def stop(self) -> None:
        """From when this returns, nothing more is written."""
        self._given_up.set()
        if self._ended is not None and not self._ended.cancel():
            wait([self._ended])

    def _copy(self, asked_s: float) -> float | None:
        for to, source, num_bytes in self._pieces():
            if self._given_up.is_set():
                return None
            ctypes.memmove(to, source, num_bytes)
        return time.perf_counter() - asked_s

    def _pieces(self) -> Iterator[tuple[int, int, int]]:
        for to, source, num_bytes in self._runs:
            for offset in range(0, num_bytes, _PIECE_BYTES):
                size = min(_PIECE_BYTES, num_bytes - offset)
                yield to + offset, source + offset, size


def merged(to: _Rows, source: _Rows, num_bytes: _Rows) -> list[tuple[int, int, int]]:
    """Copies as few and as long as they can be: those that go on where others end are one."""
    order = np.argsort(to, kind="stable")
    to, source, num_bytes = to[order], source[order], num_bytes[order]
    begins = np.ones(len(to), dtype=bool)
    begins[1:] = (to[1:] != to[:-1] + num_bytes[:-1]) | (source[1:] != source[:-1] + num_bytes[:-1])
    first = np.flatnonzero(begins)
    lengths = np.add.reduceat(num_bytes, first)
    return list(zip(to[first].tolist(), source[first].tolist(), lengths.tolist(), strict=True))


def _lengths(rows: _Rows) -> _Rows:
    """Most are alike, of millions for each peer: then they take no memory."""
    lengths = rows[:, 1]
    if len(lengths) and (lengths == lengths[0]).all():
        return np.broadcast_to(lengths[0].copy(), lengths.shape)
    return lengths.copy()


def _moved(rows: _Rows, memory: SharedMemory, mapped_at: int) -> _Rows:
    """The peer's descriptors where its memory is mapped. Raises NotShareable."""
    offsets = rows[:, 0] - np.uint64(memory.address)  # Before the memory they wrap around.
    if np.any(offsets > memory.num_bytes) or np.any(offsets + rows[:, 1] > memory.num_bytes):
        raise NotShareable("it does not hold all that the peer describes")
    moved = rows.copy()
    moved[:, 0] = offsets + np.uint64(mapped_at)
    return moved
