"""What travels between router and replica, and how it is laid out in bytes.

A frame is one kind and one msgpack message, which vLLM's encoder may split into several buffers so
that arrays are not copied into the message:

    4 bytes  length of the rest
    1 byte   kind
    1 byte   number of buffers b
    4·b      length of each buffer
    ...      the buffers

Integers are big-endian. Nothing is pickled. Owns no socket and no state of a connection.
"""

import enum
import hashlib
import hmac
import struct
from collections.abc import Iterator, Sequence

import msgspec
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest

from engine.errors import ProtocolError
from engine.steps import StepSample
from kvtransfer.peers import KVPeer

PROTOCOL_VERSION = 7
MAX_FRAME_BYTES = 256 * 1024 * 1024
MAX_GREETING_BYTES = 4096
"""No frame before authentication may be longer."""

_HEAD = struct.Struct(">IBB")


class Kind(enum.IntEnum):
    """What a frame holds; the comment names the message type and who sends it."""

    CHALLENGE = 1  # Challenge, replica
    HELLO = 2  # Hello, router
    WELCOME = 3  # ReplicaFacts, replica
    ADD = 4  # AddRequest, router
    ABORT = 5  # list[str] of request ids, router
    RELEASE = 6  # list[str] of request ids whose handed-over KV nobody will pull, router
    STEP = 7  # StepOutputs, replica
    REJECT = 8  # Rejection, replica
    WARM_UP = 9  # KVPeer of a prefill engine, router to decode
    WARMED = 10  # Warmed, decode
    FORGET = 11  # list[str] of engine ids that are gone for good, router to decode
    TAKEN = 12  # Taken, replica
    ENDED = 13  # EngineExit, replica: the last it says
    CLEAR = 20  # list[str] of request ids that are suspects no longer, router
    ASK_HOLDINGS = 21  # None, router
    HOLDINGS = 22  # Holdings, replica


class Challenge(msgspec.Struct, frozen=True):
    version: int
    nonce: bytes


class Hello(msgspec.Struct, frozen=True):
    router_id: str
    proof: bytes


class Warmed(msgspec.Struct, frozen=True):
    """A pair of engines is ready, or what keeps it apart, in one line."""

    engine_id: str
    """Of the prefill engine."""
    problem: str | None


class ReplicaFacts(msgspec.Struct, frozen=True):
    """What a replica says of itself once a router is let in."""

    engine_id: str
    kv: KVPeer
    max_model_len: int
    block_size: int
    num_kv_blocks: int
    max_num_seqs: int
    """Requests that it runs at once at most."""


class AddRequest(msgspec.Struct, frozen=True):
    request: EngineCoreRequest
    work_s: float
    """Predicted seconds of engine time, as the sending router counts it in its own ledger."""
    asks_load: bool = False
    """Whether the router wants to know at once what else the replica has: see Taken."""
    is_suspect: bool = False
    """Engines have failed with it: it must be the only such request here."""


class LoadReport(msgspec.Struct, frozen=True):
    """How loaded a replica is, beside what the reading router has sent it itself."""

    others_work_s: float = 0.0
    progress_s: float = 0.0
    """Seconds since it began with the oldest of all work: of that, so much may be done."""
    num_running: int = 0
    num_waiting: int = 0
    kv_usage_fraction: float = 0.0
    leaves_because: str = ""
    """Set once the replica wants nothing new: "drained" while it finishes what it has, "stalled"
    where its engine hangs."""
    step: StepSample | None = None
    """The last one."""
    has_suspect: bool = False
    """Another router has a suspect here."""


class StepOutputs(msgspec.Struct, frozen=True):
    """One engine step's outputs for one router. Empty when only the load is reported."""

    outputs: list[EngineCoreOutput]
    load: LoadReport


class Taken(msgspec.Struct, frozen=True):
    """A request has arrived at its replica."""

    request_id: str
    load: LoadReport


class Rejection(msgspec.Struct, frozen=True):
    """A request that this replica's engine did not take."""

    request_id: str
    reason: str
    has_suspect: bool = False
    """It is a suspect, and another one is here already."""


class Holdings(msgspec.Struct, frozen=True):
    """What a replica and its engine have at one moment."""

    request_ids: list[str]
    """Of the requests that the asking router has there."""
    num_requests: int
    """Of all routers."""
    work_s: float
    """The predicted work of all of them."""
    num_in_engine: int
    """Requests that the engine said it has after its last step."""
    num_kept: int
    """Prompts whose KV is kept for a decode replica."""
    kv_usage_fraction: float


def prove(secret: str, nonce: bytes) -> bytes:
    """The answer to a challenge: the secret itself never travels."""
    return hmac.new(secret.encode(), nonce, hashlib.sha256).digest()


def pack_frame(kind: Kind, buffers: Sequence[bytes | memoryview]) -> bytes:
    """One frame, ready to be written."""
    views = [memoryview(buffer).cast("B") for buffer in buffers]
    lengths = struct.pack(f">{len(views)}I", *(view.nbytes for view in views))
    length = 2 + len(lengths) + sum(view.nbytes for view in views)
    if length > MAX_FRAME_BYTES or len(views) > 255:
        raise ProtocolError(f"a {kind.name} of {length} bytes in {len(views)} buffers is too large")
    return b"".join((_HEAD.pack(length, kind, len(views)), lengths, *views))


class FrameReader:
    """Cuts a stream of bytes into frames. Owns the bytes of the frame that is not complete yet."""

    def __init__(self) -> None:
        self._pending = bytearray()
        self.max_bytes = MAX_GREETING_BYTES
        """Raised by the owner once the other side is known."""

    def feed(self, chunk: bytes) -> Iterator[tuple[Kind, list[bytes]]]:
        """Yields each frame that `chunk` completes.

        Raises:
            ProtocolError: a frame is over the limit, malformed, or of an unknown kind.
        """
        self._pending += chunk
        while len(self._pending) >= 4:
            length = int.from_bytes(self._pending[:4], "big")
            if not 2 <= length <= self.max_bytes:
                raise ProtocolError(f"a frame of {length} bytes (at most {self.max_bytes})")
            if len(self._pending) < 4 + length:
                return
            frame = bytes(self._pending[: 4 + length])
            del self._pending[: 4 + length]
            yield _unpack_frame(frame)


def _unpack_frame(frame: bytes) -> tuple[Kind, list[bytes]]:
    length, kind, num_buffers = _HEAD.unpack_from(frame)
    start = _HEAD.size + 4 * num_buffers
    if start > len(frame):
        raise ProtocolError("a frame ends within its buffer lengths")
    sizes = struct.unpack_from(f">{num_buffers}I", frame, _HEAD.size)
    if start + sum(sizes) != len(frame) or num_buffers == 0:
        raise ProtocolError(f"a frame of {length} bytes does not hold what its lengths say")
    try:
        known = Kind(kind)
    except ValueError:
        raise ProtocolError(f"a frame of unknown kind {kind}") from None
    buffers = []
    for size in sizes:
        buffers.append(frame[start : start + size])
        start += size
    return known, buffers
