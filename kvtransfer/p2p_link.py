"""The process group of one prefill/decode pair: Gloo between CPUs, NCCL between GPUs.

Owns how a group of two is made, used and ended, and Gloo's; NCCL's is in `kvtransfer.p2p_nccl`.
Never knows what it carries, nor another pair.

No group here is torch's default one, nor known to it: each has its own rendezvous, and ends alone.
"""

import contextlib
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, TCPStore

from kvtransfer.p2p_errors import PairBroken, PairTimeout

PREFILL_RANK, DECODE_RANK = 0, 1

Wait = Callable[[], None]
"""Returns when the buffer of a send or a receive may be used again; raises PairBroken."""


class Link(Protocol):
    """One end of a pair's group. One thread uses it, inside `stream()`.

    Sends and receives are matched by their order. After any error the link is to be closed.
    """

    device: torch.device
    chunk_bytes: int
    """Of a message: enough to hide what one costs, and so few that two are copied and sent at once.
    The same on both sides."""

    def stream(self) -> AbstractContextManager[Any]:
        """Where the copies into and out of the buffers must be queued."""

    def send(self, buffer: torch.Tensor) -> Wait: ...

    def receive(self, buffer: torch.Tensor) -> Wait: ...

    def finish(self) -> None:
        """Returns when all that was queued is done. Raises PairBroken."""

    @property
    def is_stuck(self) -> bool:
        """Whether the thread that uses it is lost in a call that nothing ends."""

    def close(self) -> None:
        """Ends the group; a second time is as good. When it returns nothing touches a buffer or a
        block any more; raises PairStuck where that cannot be had."""


Opening = tuple[bytes, Callable[[], Link]]
"""The address for decode, and what prefill calls once decode has it."""


class Transport(Protocol):
    """Makes links; one for each worker."""

    def invite(self, host: str) -> Opening:
        """Prefill's side of a new group, reached at this host's address `host`."""

    def join(self, host: str, address: bytes) -> Link:
        """Decode's side of the group that prefill at `host` waits in. Raises PairBroken."""


class GlooLink:
    """A Gloo group of two. Owns its sockets."""

    device = torch.device("cpu")
    chunk_bytes = 1 << 20  # Of 256 KiB to 4 MiB the fastest: both buffers stay in a core's cache.

    def __init__(self, group: Any, peer: int) -> None:
        self._group, self._peer = group, peer

    def stream(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def send(self, buffer: torch.Tensor) -> Wait:
        with broken_pairs():
            return _waiting_for(self._group.send([buffer], self._peer, 0), buffer)

    def receive(self, buffer: torch.Tensor) -> Wait:
        with broken_pairs():
            return _waiting_for(self._group.recv([buffer], self._peer, 0), buffer)

    def finish(self) -> None:
        """Nothing is queued: every wait has been waited for."""

    @property
    def is_stuck(self) -> bool:
        return False  # Gloo's calls have limits of time.

    def close(self) -> None:
        self._group = None


class GlooTransport:
    """Groups over TCP from one of this host's addresses. Owns Gloo's thread."""

    def __init__(self, host: str, *, timeout_s: float) -> None:
        self._device = ProcessGroupGloo.create_device(hostname=host)
        self._timeout = timedelta(seconds=timeout_s)

    def invite(self, host: str) -> Opening:
        # By itself the store would listen at every address of this host, for as long as the group
        # lives. It owns the socket from here on.
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, 0), family=family)
        port: int = listener.getsockname()[1]
        store = TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=self._timeout,
            master_listen_fd=listener.detach(),
            use_libuv=True,
        )
        return str(port).encode(), lambda: self._open(store, PREFILL_RANK)

    def join(self, host: str, address: bytes) -> Link:
        with broken_pairs():
            store = TCPStore(
                host, int(address), is_master=False, wait_for_workers=False, timeout=self._timeout
            )
        return self._open(store, DECODE_RANK)

    def _open(self, store: Any, rank: int) -> Link:
        options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [self._device]
        options._threads = 1
        options._timeout = self._timeout
        with broken_pairs():
            group = ProcessGroupGloo(PrefixStore("pair", store), rank, 2, options)
        return GlooLink(group, peer=1 - rank)


def transport_for(device: torch.device, host: str, *, timeout_s: float) -> Transport:
    """NCCL where the KV cache is on a GPU, Gloo from `host` where it is in memory.

    A transfer that makes no progress for `timeout_s` is given up.
    """
    if device.type == "cuda":
        from kvtransfer.p2p_nccl import NcclTransport

        return NcclTransport(device, timeout_s=timeout_s)
    if device.type == "cpu":
        return GlooTransport(host, timeout_s=timeout_s)
    raise ValueError(f"no point-to-point transport for a KV cache on {device.type}")


def _waiting_for(work: Any, buffer: torch.Tensor) -> Wait:
    def wait() -> None:
        with broken_pairs():
            work.wait()
        assert buffer is not None  # Gloo has only its address: kept alive until here.

    return wait


@contextlib.contextmanager
def broken_pairs() -> Iterator[None]:
    """What a group's library raises becomes a PairBroken or PairTimeout."""
    # torch, Gloo and NCCL raise RuntimeErrors, some of them told apart by their text only.
    try:
        yield
    except RuntimeError as error:
        first_line = str(error).partition("\n")[0]
        timed_out = "timed out" in first_line.lower() or "timeout" in first_line.lower()
        raise (PairTimeout if timed_out else PairBroken)(first_line) from error
