"""The side channel: where a peer asks for an engine's NIXL agent before the first transfer.

Owns one listening socket. Never sees KV. vLLM's own listener wants its port chosen beforehand,
which races with every other engine on the host; here the kernel chooses: while the channel binds,
or, for whoever must know the port before the engine runs, while `ReservedPort` does. The wire is
vLLM's, its workers are the clients.
"""

import socket
import threading
import time
from collections.abc import Mapping
from typing import Self

import msgspec
import zmq

from kvtransfer.handshake import bracketed

_STOP_POLL_MS = 200


class SideChannel:
    """Answers `(query, pp rank, tp rank)` with that rank's agent metadata and this clock's time.

    Owns its socket and its thread. `port` is the bound one: a reserved one, or the kernel's choice.
    """

    def __init__(
        self,
        host: str,
        payloads: Mapping[tuple[int, int], bytes],
        reserved_port: int | None = None,
    ) -> None:
        self._payloads = payloads
        self._stopping = threading.Event()
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.IPV6, ":" in host)
        self._socket.setsockopt(zmq.RCVTIMEO, _STOP_POLL_MS)
        address = f"tcp://{bracketed(host)}"
        if reserved_port is None:
            self.port: int = self._socket.bind_to_random_port(address)
        else:
            self._socket.bind(f"{address}:{reserved_port}")
            self.port = reserved_port
        self.thread = threading.Thread(target=self._serve, daemon=True, name="kv-side-channel")
        self.thread.start()

    def stop(self) -> None:
        """End the thread and close the socket; takes a fifth of a second."""
        self._stopping.set()
        self.thread.join()

    def _serve(self) -> None:
        while not self._stopping.is_set():
            try:
                identity, _, query = self._socket.recv_multipart()
            except zmq.Again:
                continue
            self._answer(identity, query)
        self._context.destroy(linger=0)

    def _answer(self, identity: bytes, query: bytes) -> None:
        try:
            _, pp_rank, tp_rank = msgspec.msgpack.decode(query)
            payload = self._payloads[pp_rank, tp_rank]
        except (msgspec.DecodeError, TypeError, ValueError, KeyError):
            return  # Not one of ours: the port is open to whoever finds it.
        # The clock lets the peer translate this engine's deadlines into its own time.
        clock = msgspec.msgpack.encode(time.perf_counter())
        self._socket.send_multipart([identity, b"", payload, clock])


class ReservedPort:
    """A port that the kernel gives to nobody else, for a side channel of another process.

    Owns a socket that is bound and never listens. Linux lets a second socket bind beside it, when
    both allow the address to be reused, as ZMQ's do; it never chooses the port for anyone itself.
    Keep it until the engine runs. Raises OSError where the host has no such address.
    """

    def __init__(self, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((host, 0))
        self.port: int = self._socket.getsockname()[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the port up, or leave it to the channel that is bound to it by now."""
        self._socket.close()
