"""The process group of one prefill/decode pair between GPUs: a NCCL communicator of two.

Owns the communicator and the CUDA stream that its copies run on. Never knows what it carries. No
GPU has run it yet: its tests have a stand-in for NCCL.

NCCL waits for ever for a peer that is gone, in its calls and in its kernels, and CUDA for the
kernels. So the start is made in a thread that can be left behind, and all that follows is watched:
what makes no progress is aborted, from another thread as NCCL wants it, after which both return.
NCCL is not used through torch's `ProcessGroupNCCL`, whose watchdog ends the whole process when one
peer dies, nor through vLLM's communicator, whose start waits for ever.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from kvtransfer.nccl_library import Nccl
from kvtransfer.p2p_errors import PairError, PairStuck
from kvtransfer.p2p_link import DECODE_RANK, PREFILL_RANK, Link, Opening, Wait, broken_pairs
from kvtransfer.p2p_watch import LimitedCalls, Watch

_POLL_S = 100e-6
_START_S = 20.0
"""NCCL looks for its networks and connects: seconds."""
_END_S = 10.0
"""For the abort, and then for the device to end what was queued: milliseconds, if ever."""
_MOST_STARTS_GIVEN_UP = 16
_MOST_QUEUED = 32
"""Messages on the stream. CUDA takes about a thousand kernels, then its calls wait for them."""


class WorkQueue(Protocol):
    """What a device does in order: a CUDA stream."""

    device: torch.device
    handle: int
    """As NCCL takes it."""

    def use(self) -> AbstractContextManager[None]:
        """What torch does meanwhile is queued here."""

    def mark(self) -> Callable[[], bool]:
        """Whether all that was queued until now is done."""


class CudaQueue:
    """A stream of its own on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self._stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.handle: int = self._stream.cuda_stream

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            yield

    def mark(self) -> Callable[[], bool]:
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        is_done: Callable[[], bool] = event.query
        return is_done


class NcclLink:
    """A communicator of two and the queue its copies are in. Owns both, and the watch over them."""

    chunk_bytes = 8 << 20

    def __init__(
        self,
        nccl: Nccl,
        communicator: Any,
        queue: WorkQueue,
        peer: int,
        *,
        timeout_s: float,
        end_timeout_s: float,
    ) -> None:
        self.device = queue.device
        self._nccl, self._communicator, self._queue, self._peer = nccl, communicator, queue, peer
        self._end_timeout_s = end_timeout_s
        self._marks: deque[Callable[[], bool]] = deque()
        self._abort_once = threading.Lock()
        self._aborted = threading.Event()
        self._watch = Watch(timeout_s, self._abort)

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        with self._queue.use(), self._watch.watching():
            yield

    def send(self, buffer: torch.Tensor) -> Wait:
        return self._queued(self._nccl.send, buffer)

    def receive(self, buffer: torch.Tensor) -> Wait:
        return self._queued(self._nccl.receive, buffer)

    def finish(self) -> None:
        with broken_pairs():
            self._marks.append(self._queue.mark())
            while self._marks:
                self._await_oldest()

    @property
    def is_stuck(self) -> bool:
        return self._watch.overdue_s() > self._end_timeout_s

    def close(self) -> None:
        """Raises PairStuck where blocks may still be read or written: NCCL or the device hangs."""
        self._watch.stop()
        threading.Thread(target=self._abort, daemon=True, name="kv-abort").start()
        if not self._aborted.wait(self._end_timeout_s):
            raise PairStuck("NCCL does not abort")
        # The copies queued behind its kernels use blocks that are given back after this.
        until_s = time.monotonic() + self._end_timeout_s
        with broken_pairs():
            is_done = self._queue.mark()
            while not is_done():
                if time.monotonic() > until_s:
                    raise PairStuck("the device does not end what was queued")
                time.sleep(_POLL_S)

    def _queued(self, call: Callable[..., None], buffer: torch.Tensor) -> Wait:
        # From here on the watch leaves the communicator alone for its whole time.
        self._watch.progress()
        with broken_pairs():
            call(buffer, self._peer, self._communicator, self._queue.handle)
            self._marks.append(self._queue.mark())
            while len(self._marks) > _MOST_QUEUED:
                self._await_oldest()
        return _in_stream_order

    def _await_oldest(self) -> None:
        is_done = self._marks[0]
        while not is_done():
            self._watch.check()
            time.sleep(_POLL_S)
        self._marks.popleft()
        # After an abort everything is done, but not as it should be.
        self._watch.progress()

    def _abort(self) -> None:
        # Whichever thread is first; in NCCL's hands it may stay for ever.
        if self._abort_once.acquire(blocking=False):
            try:
                self._nccl.abort(self._communicator)
            finally:
                self._aborted.set()


class NcclTransport:
    """Groups between GPUs, one communicator each. Owns the starts that did not end in time."""

    def __init__(
        self,
        device: torch.device,
        *,
        timeout_s: float,
        start_timeout_s: float = _START_S,
        end_timeout_s: float = _END_S,
        new_queue: Callable[[torch.device], WorkQueue] = CudaQueue,
    ) -> None:
        self._device, self._timeout_s, self._new_queue = device, timeout_s, new_queue
        self._start_timeout_s, self._end_timeout_s = start_timeout_s, end_timeout_s
        self._starts = LimitedCalls(most_given_up=_MOST_STARTS_GIVEN_UP)

    def invite(self, host: str) -> Opening:
        with broken_pairs():
            unique_id = Nccl().new_unique_id()
        return unique_id, lambda: self._open(unique_id, PREFILL_RANK)

    def join(self, host: str, address: bytes) -> Link:
        return self._open(address, DECODE_RANK)

    def _open(self, unique_id: bytes, rank: int) -> Link:
        return self._starts.within(
            self._start_timeout_s, lambda: self._start(unique_id, rank), NcclLink.close
        )

    def _start(self, unique_id: bytes, rank: int) -> NcclLink:
        with broken_pairs():
            nccl, queue = Nccl(), self._new_queue(self._device)
            with queue.use():
                communicator = nccl.join(unique_id, rank, num_ranks=2)
        link = NcclLink(
            nccl,
            communicator,
            queue,
            1 - rank,
            timeout_s=self._timeout_s,
            end_timeout_s=self._end_timeout_s,
        )
        try:
            # NCCL connects two ranks at their first message: now, while both are known to live.
            with link.stream():
                first = torch.zeros(1, dtype=torch.uint8, device=self._device)
                (link.send if rank == PREFILL_RANK else link.receive)(first)
                link.finish()
        except PairError:
            link.close()
            raise
        return link


def _in_stream_order() -> None:
    """The next copy or message on the stream comes after this one."""
