"""The side channel: where a peer asks for an engine's NIXL agent before the first transfer.

Owns both ends of it: one listening socket in a prefill engine, and the question of a decode engine.
Never sees KV. vLLM's own listener wants its port chosen beforehand, which races with every other
engine on the host, and answers anybody; here the kernel chooses: while the channel binds, or, for
whoever must know the port before the engine runs, while `ReservedPort` does. Only members of the
application are answered, by the engine that they have named.

After the greeting, in both directions: 4 bytes length, big-endian, and a msgpack message. The
question is a (pp rank, tp rank), the answer its payload, or none, and this clock's time.
"""

import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import msgspec

from kvtransfer.errors import PeerTimeout, PeerUnreachable
from kvtransfer.greeting import ClientGreeting, ServerGreeting, greet
from kvtransfer.listener import Listener
from kvtransfer.tls import Tls, open_connection

PURPOSE = "kv side channel"
VERSION = 1
CONNECT_TIMEOUT_S = 1.0
ANSWER_TIMEOUT_S = 5.0
_MAX_QUESTION_BYTES = 64
_MAX_ANSWER_BYTES = 1 << 30

Rank = tuple[int, int]
"""Of a worker: in its pipeline, and in its tensor parallel group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one worker tells its peers, and what the way there took."""

    payload: bytes
    round_trip_s: float
    clock_offset_s: float
    """What to add to this process's `time.perf_counter` for the other's."""


class SideChannel:
    """Answers for the workers of the engine `engine_id`. Owns its listener.

    `port` is the bound one: a reserved one, or the kernel's choice.
    """

    def __init__(
        self,
        host: str,
        payloads: Mapping[Rank, bytes],
        reserved_port: int | None = None,
        *,
        engine_id: str,
        secret: str,
        tls: Tls | None = None,
    ) -> None:
        self._payloads = payloads
        self._listener = Listener(
            host,
            lambda: ServerGreeting(engine_id, secret=secret, purpose=PURPOSE, version=VERSION),
            self._serve,
            name="kv-side-channel",
            port=reserved_port or 0,
            tls=tls,
        )
        self.port = self._listener.port

    def stop(self) -> None:
        """Close the socket and end its threads."""
        self._listener.stop()

    def _serve(self, sock: socket.socket) -> None:
        sock.settimeout(ANSWER_TIMEOUT_S)
        while (question := _receive(sock, _MAX_QUESTION_BYTES)) is not None:
            try:
                payload = self._payloads.get(msgspec.msgpack.decode(question, type=Rank))
            except msgspec.DecodeError:
                return  # A member of another version: it sees the end of the connection.
            # The clock lets the peer translate this engine's deadlines into its own time.
            _send(sock, msgspec.msgpack.encode((payload, time.perf_counter())))


def ask(
    host: str,
    port: int,
    ranks: Iterable[Rank],
    *,
    engine_id: str,
    secret: str,
    tls: Tls | None = None,
    timeout_s: float = ANSWER_TIMEOUT_S,
) -> dict[Rank, Answer]:
    """What these workers of the engine `engine_id` tell. Blocks for a few seconds at most.

    Raises:
        PeerUnreachable: nobody answers, or not in time (PeerTimeout), or not for one of the ranks.
        GreetingFailed: who answers is no member, or another engine.
    """
    place = f"{host}:{port}"
    try:
        sock = open_connection((host, port), tls, timeout_s=min(timeout_s, CONNECT_TIMEOUT_S))
    except OSError as error:
        raise _unreachable(f"no KV engine listens at {place}", error) from None
    try:
        with sock:
            greeting = ClientGreeting(
                "peer", engine_id, secret=secret, purpose=PURPOSE, version=VERSION
            )
            greet(sock, greeting, timeout_s=timeout_s)
            sock.settimeout(timeout_s)
            return {rank: _ask(sock, rank) for rank in ranks}
    except (OSError, msgspec.DecodeError) as error:
        raise _unreachable(f"the KV engine at {place} does not answer", error) from None


def _unreachable(what: str, error: Exception) -> PeerUnreachable:
    if isinstance(error, TimeoutError):
        return PeerTimeout(f"{what}: {error}")
    return PeerUnreachable(f"{what}: {error}")


def _ask(sock: socket.socket, rank: Rank) -> Answer:
    asked_s = time.perf_counter()
    _send(sock, msgspec.msgpack.encode(rank))
    answer = _receive(sock, _MAX_ANSWER_BYTES)
    heard_s = time.perf_counter()
    if answer is None:
        raise ConnectionResetError("it hangs up when asked")
    payload, clock_s = msgspec.msgpack.decode(answer, type=tuple[bytes | None, float])
    if payload is None:
        raise ConnectionRefusedError(f"it has no rank {rank}")
    return Answer(
        payload=payload,
        round_trip_s=heard_s - asked_s,
        clock_offset_s=clock_s - (asked_s + heard_s) / 2,
    )


def _send(sock: socket.socket, message: bytes) -> None:
    sock.sendall(len(message).to_bytes(4, "big") + message)


def _receive(sock: socket.socket, max_bytes: int) -> bytes | None:
    """The next message; None where the other side has closed the connection before it."""
    if (head := _read(sock, 4)) is None:
        return None
    length = int.from_bytes(head, "big")
    if length > max_bytes:
        raise ConnectionAbortedError(f"a message of {length} bytes is none of ours")
    return _read(sock, length)


def _read(sock: socket.socket, num_bytes: int) -> bytes | None:
    read = bytearray()
    while len(read) < num_bytes:
        if not (piece := sock.recv(min(num_bytes - len(read), 1 << 20))):
            return None
        read += piece
    return bytes(read)


class ReservedPort:
    """A port that the kernel gives to nobody else, for a side channel of another process.

    Owns a socket that is bound and never listens. Linux lets a second socket bind beside it, when
    both allow the address to be reused, as the channel does; it never chooses the port for anyone
    itself. Keep it until the engine runs. Raises OSError where the host has no such address.
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
