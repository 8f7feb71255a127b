"""The side channel: where a peer asks for an engine's NIXL agent before the first transfer.

Owns one listening socket. Never sees KV. vLLM's own listener wants its port chosen beforehand,
which races with every other engine on the host; this one lets the kernel choose while it binds.
The wire is vLLM's, its workers are the clients.
"""

import threading
import time
from collections.abc import Mapping

import msgspec
import zmq

_STOP_POLL_MS = 200


class SideChannel:
    """Answers `(query, pp rank, tp rank)` with that rank's agent metadata and this clock's time.

    Owns its socket and its thread. `port` is the bound one.
    """

    def __init__(self, host: str, payloads: Mapping[tuple[int, int], bytes]) -> None:
        self._payloads = payloads
        self._stopping = threading.Event()
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.IPV6, ":" in host)
        self._socket.setsockopt(zmq.RCVTIMEO, _STOP_POLL_MS)
        self.port: int = self._socket.bind_to_random_port(f"tcp://{_bracketed(host)}")
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


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
