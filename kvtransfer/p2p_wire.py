"""What the two workers of a pair say to each other, beside the KV itself.

Owns the messages and their framing on a TCP connection, which begins with a greeting. Never touches
a tensor. Decode speaks, prefill answers `Hello` and `Fetch`; nothing else is answered.
"""

import contextlib
import select
import socket
import struct
from typing import Any

import msgspec

from kvtransfer.errors import GreetingFailed
from kvtransfer.greeting import ClientGreeting, greet
from kvtransfer.p2p_errors import PairBroken, PairTimeout
from kvtransfer.tls import Tls, open_connection

PURPOSE = "kv pair"
VERSION = 2
_LENGTH = struct.Struct("!I")
_MAX_MESSAGE_BYTES = 64 << 20
# A host that is gone says nothing: the kernel then ends the connection after about half a minute.
_KEEPALIVE = {socket.TCP_KEEPIDLE: 15, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3}


class Hello(msgspec.Struct, tag=True, frozen=True):
    """Decode asks for a group with this very start of a prefill engine."""

    decode_engine_id: str
    prefill_engine_id: str


class Welcome(msgspec.Struct, tag=True, frozen=True):
    """Prefill waits for decode in a new group; `address` is the transport's."""

    address: bytes


class Fetch(msgspec.Struct, tag=True, frozen=True):
    """Decode wants these blocks of a request, a tuple for each KV cache group."""

    request_id: str
    lease_id: int
    block_ids: tuple[tuple[int, ...], ...]


class Granted(msgspec.Struct, tag=True, frozen=True):
    """The blocks follow over the group."""


class Refused(msgspec.Struct, tag=True, frozen=True):
    """No blocks follow, or no group."""

    reason: str


class Finished(msgspec.Struct, tag=True, frozen=True):
    """Decode has what it needs of a request, or needs nothing: prefill may free it."""

    request_id: str
    lease_id: int


class Heartbeat(msgspec.Struct, tag=True, frozen=True):
    """Decode will come for these requests: keep them."""

    request_ids: tuple[str, ...]


Message = Hello | Welcome | Fetch | Granted | Refused | Finished | Heartbeat
_decoder = msgspec.msgpack.Decoder(Message)


class Connection:
    """One TCP connection between two workers. Owns its socket; one thread uses it.

    `timeout_s` is for sending; receiving has its own.
    """

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE.items():
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        self._sock, self._timeout_s = sock, timeout_s

    @classmethod
    def open(
        cls,
        host: str,
        port: int,
        timeout_s: float,
        *,
        name: str,
        engine_id: str,
        secret: str,
        tls: Tls | None = None,
    ) -> "Connection":
        """To a worker of the engine `engine_id`, of one that is called `name`.

        Raises PairBroken where nobody listens, or another one, and PairTimeout.
        """
        greeting = ClientGreeting(name, engine_id, secret=secret, purpose=PURPOSE, version=VERSION)
        with contextlib.ExitStack() as undo:
            try:
                sock = undo.enter_context(open_connection((host, port), tls, timeout_s=timeout_s))
                greet(sock, greeting, timeout_s=timeout_s)
            except TimeoutError as error:
                raise PairTimeout(f"{host}:{port} does not answer") from error
            except (OSError, GreetingFailed) as error:
                raise PairBroken(f"{host}:{port}: {error}") from error
            undo.pop_all()
        return cls(sock, timeout_s)

    @property
    def local_host(self) -> str:
        """The address of this host that the peer reached or was reached from."""
        host: str = self._sock.getsockname()[0]
        return host

    def send(self, message: Message) -> None:
        """Raises PairBroken."""
        payload = msgspec.msgpack.encode(message)
        self._sock.settimeout(self._timeout_s)
        try:
            self._sock.sendall(_LENGTH.pack(len(payload)) + payload)
        except TimeoutError as error:
            raise PairTimeout("the peer takes no more messages") from error
        except OSError as error:
            raise PairBroken(f"connection lost: {error}") from error

    def receive(self, timeout_s: float | None) -> Message:
        """The next message; None waits for ever.

        Raises PairTimeout, or PairBroken where the peer is gone or speaks another language.
        """
        self._sock.settimeout(timeout_s)
        (num_bytes,) = _LENGTH.unpack(self._read(_LENGTH.size))
        if num_bytes > _MAX_MESSAGE_BYTES:
            raise PairBroken(f"a message of {num_bytes} bytes is none of ours")
        try:
            message: Message = _decoder.decode(self._read(num_bytes))
        except msgspec.DecodeError as error:
            raise PairBroken(f"not a message of ours: {error}") from error
        return message

    @property
    def has_ended(self) -> bool:
        """Whether the peer has closed it, when no answer is due: then only its end can come."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(0))

    def end(self) -> None:
        """Wakes whoever waits for a message, on both sides; from any thread."""
        with contextlib.suppress(OSError):  # The peer may have ended it.
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()

    def _read(self, num_bytes: int) -> bytes:
        read = bytearray()
        while len(read) < num_bytes:
            try:
                piece = self._sock.recv(num_bytes - len(read))
            except TimeoutError as error:
                raise PairTimeout("the peer does not answer") from error
            except OSError as error:
                raise PairBroken(f"connection lost: {error}") from error
            if not piece:
                raise PairBroken("the peer closed the connection")
            read += piece
        return bytes(read)

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
