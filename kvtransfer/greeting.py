"""How two processes of one application prove to each other who they are, before they say more.

The first messages of every channel of ours, one after the other on a new connection:

    Challenge   from who listens: a nonce
    Hello       from who connects: a nonce of its own, whom it wants to reach, and its proof
    Admitted    from who listens: its proof

or a Refusal, from either. A proof is an HMAC under the application's secret over both nonces, both
names and what the channel is for, so none fits another connection, another channel, or the other
side. Each message is

    4 bytes  length of the rest
    1 byte   kind
    1 byte   1
    4 bytes  length of the message
    ...      the message, msgpack

in big-endian integers. This layout stays as it is when the protocol changes: different versions can
tell each other so. Nothing is encrypted, and nothing keeps who can change packets on their way from
speaking after the greeting.

Owns no socket. Never says who may connect: whoever knows the secret may.
"""

import enum
import hashlib
import hmac
import os
import socket
import struct
import threading
import time
from collections.abc import Callable

import msgspec

from kvtransfer.complaints import Complaints
from kvtransfer.errors import GreetingFailed

MAX_GREETING_BYTES = 4096
"""No message before authentication may be longer."""

MAX_STRANGERS = 64
"""Connections of one listener that have not greeted yet."""

_HEAD = struct.Struct(">IBBI")
_NONCE_BYTES = 32
_MAX_REASON = 300
"""Characters of what a stranger may have us write to a log."""


class GreetingKind(enum.IntEnum):
    """Numbers beside those of `engine.wire.Kind`, which follows on the same connections."""

    CHALLENGE = 1
    HELLO = 2
    ADMITTED = 14
    REFUSAL = 15


class Challenge(msgspec.Struct, frozen=True):
    version: int
    nonce: bytes


class Hello(msgspec.Struct, frozen=True):
    version: int
    name: str
    wanted: str
    nonce: bytes
    proof: bytes


class Admitted(msgspec.Struct, frozen=True):
    proof: bytes


class Refusal(msgspec.Struct, frozen=True):
    reason: str


_Message = Challenge | Hello | Admitted | Refusal
_TYPES: dict[GreetingKind, type[_Message]] = {
    GreetingKind.CHALLENGE: Challenge,
    GreetingKind.HELLO: Hello,
    GreetingKind.ADMITTED: Admitted,
    GreetingKind.REFUSAL: Refusal,
}
_KINDS = {type_: kind for kind, type_ in _TYPES.items()}


class Greeting:
    """One side's part: bytes in, bytes to send out. `ServerGreeting` or `ClientGreeting`.

    `purpose` and `version` are the channel's, the same on both sides.
    """

    def __init__(self, *, secret: str, purpose: str, version: int) -> None:
        self._secret, self._purpose, self._version = secret.encode(), purpose, version
        self._nonce = os.urandom(_NONCE_BYTES)
        self._received = bytearray()
        self.is_done = False
        """The other side is a member, and has been told that we are."""
        self.peer_name = ""
        """How it calls itself, once done."""

    @property
    def num_wanted(self) -> int:
        """How many bytes there are at least to come before anything can be answered."""
        missing = _HEAD.size - len(self._received)
        return missing if missing > 0 else 4 + self._length() - len(self._received)

    def begin(self) -> bytes:
        """What is to be sent first."""
        return b""

    def feed(self, chunk: bytes) -> bytes:
        """Takes in what has come; returns what is to be sent.

        Raises:
            GreetingFailed: the other side may not go on. Its `farewell` may be sent before the end.
        """
        self._received += chunk
        answers = b""
        while not self.is_done and (message := self._next()) is not None:
            answers += self._answer(message)
        return answers

    def take_rest(self) -> bytes:
        """What has come after the greeting, with the last of it."""
        rest, self._received = bytes(self._received), bytearray()
        return rest

    def _answer(self, message: _Message) -> bytes:
        raise NotImplementedError

    def _length(self) -> int:
        return int.from_bytes(self._received[:4], "big")

    def _next(self) -> _Message | None:
        if len(self._received) < 4:
            return None
        length = self._length()
        if not _HEAD.size - 4 <= length <= MAX_GREETING_BYTES:
            raise GreetingFailed("what it says is no greeting of ours")
        if len(self._received) < 4 + length:
            return None
        _, kind, num_buffers, num_bytes = _HEAD.unpack_from(self._received)
        body = bytes(self._received[_HEAD.size : 4 + length])
        del self._received[: 4 + length]
        if num_buffers != 1 or num_bytes != len(body) or kind not in _TYPES:
            raise GreetingFailed("what it says is no greeting of ours")
        try:
            message = msgspec.msgpack.decode(body, type=_TYPES[GreetingKind(kind)])
        except (msgspec.DecodeError, RecursionError) as error:
            raise GreetingFailed(f"its greeting cannot be read: {error}") from None
        if isinstance(message, Refusal):
            raise GreetingFailed(f"the other side refuses: {printable(message.reason)}")
        return message

    def _check_version(self, version: int) -> None:
        if version != self._version:
            raise _refusal(f"protocol {version} meets protocol {self._version}")

    def _prove(self, role: str, challenge: bytes, name: str, wanted: str, nonce: bytes) -> bytes:
        said = (role, self._purpose, self._version, challenge, name, wanted, nonce)
        return hmac.digest(self._secret, msgspec.msgpack.encode(said), hashlib.sha256)

    def _check_proof(self, proof: bytes, expected: bytes) -> None:
        if not hmac.compare_digest(proof, expected):
            raise _refusal("the other side does not know this application's secret")


class ServerGreeting(Greeting):
    """Of who listens and is called `name`."""

    def __init__(self, name: str, *, secret: str, purpose: str, version: int) -> None:
        super().__init__(secret=secret, purpose=purpose, version=version)
        self._name = name

    def begin(self) -> bytes:
        return pack_greeting(Challenge(self._version, self._nonce))

    def _answer(self, message: _Message) -> bytes:
        if not isinstance(message, Hello):
            raise GreetingFailed(f"{type(message).__name__} is not how one greets here")
        self._check_version(message.version)
        said = (self._nonce, message.name, message.wanted, message.nonce)
        self._check_proof(message.proof, self._prove("client", *said))
        if message.wanted != self._name:
            raise _refusal(f"this is {self._name}, not {message.wanted}")
        self.peer_name = message.name
        self.is_done = True
        return pack_greeting(Admitted(self._prove("server", *said)))


class ClientGreeting(Greeting):
    """Of who connects, calls itself `name` and wants to reach the one called `wanted`."""

    def __init__(self, name: str, wanted: str, *, secret: str, purpose: str, version: int) -> None:
        super().__init__(secret=secret, purpose=purpose, version=version)
        self._name, self._wanted = name, wanted
        self._challenge: bytes | None = None

    def _answer(self, message: _Message) -> bytes:
        if isinstance(message, Challenge) and self._challenge is None:
            self._check_version(message.version)
            self._challenge = message.nonce
            proof = self._prove("client", *self._said(message.nonce))
            hello = Hello(self._version, self._name, self._wanted, self._nonce, proof)
            return pack_greeting(hello)
        if isinstance(message, Admitted) and self._challenge is not None:
            self._check_proof(message.proof, self._prove("server", *self._said(self._challenge)))
            self.peer_name = self._wanted
            self.is_done = True
            return b""
        raise GreetingFailed(f"{type(message).__name__} is not how one greets here")

    def _said(self, challenge: bytes) -> tuple[bytes, str, str, bytes]:
        return challenge, self._name, self._wanted, self._nonce


def greet(sock: socket.socket, greeting: Greeting, *, timeout_s: float) -> None:
    """Goes through a greeting on a blocking socket, and reads not a byte more.

    Raises:
        GreetingFailed: the other side is no member, not the one we want, or hangs up.
        TimeoutError, OSError
    """
    until_s = time.monotonic() + timeout_s
    to_send = greeting.begin()
    while True:
        sock.settimeout(_left(until_s))
        sock.sendall(to_send)
        if greeting.is_done:
            return
        sock.settimeout(_left(until_s))
        piece = sock.recv(greeting.num_wanted)
        if not piece:
            raise GreetingFailed("the other side hangs up at the greeting")
        try:
            to_send = greeting.feed(piece)
        except GreetingFailed as failure:
            sock.sendall(failure.farewell)
            raise


def pack_greeting(message: _Message) -> bytes:
    """One message of a greeting, ready to be written."""
    body = msgspec.msgpack.encode(message)
    return _HEAD.pack(_HEAD.size - 4 + len(body), _KINDS[type(message)], 1, len(body)) + body


def printable(text: str) -> str:
    """What somebody else has written, fit for a line of a log."""
    return "".join(c if c.isprintable() else "?" for c in text[:_MAX_REASON])


class Lobby:
    """The connections of one listener that have not greeted yet. Owns which of them has to go.

    At most so many wait; one more has the oldest put out, which a member never is for long. From
    any thread.
    """

    def __init__(self, size: int = MAX_STRANGERS) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._waiting: dict[object, Callable[[], None]] = {}
        self._complaints = Complaints()

    def __len__(self) -> int:
        return len(self._waiting)

    def enter(self, who: object, put_out: Callable[[], None]) -> None:
        with self._lock:
            self._waiting[who] = put_out
            oldest = next(iter(self._waiting)) if len(self._waiting) > self._size else None
            put_out_oldest = self._waiting.pop(oldest) if oldest is not None else None
        if put_out_oldest is not None:
            put_out_oldest()

    def leave(self, who: object) -> None:
        with self._lock:
            self._waiting.pop(who, None)

    def complain(self, log: Callable[[str], None], address: str, text: str) -> None:
        """Logs what was wrong with a connection from `address`, unless there is much of that."""
        if (line := self._complaints.line(address, text)) is not None:
            log(line)


def _refusal(reason: str) -> GreetingFailed:
    return GreetingFailed(reason, farewell=pack_greeting(Refusal(reason)))


def _left(until_s: float) -> float:
    left_s = until_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("the other side does not greet")
    return left_s
