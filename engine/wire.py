"""What travels between router and replica, and how it is laid out in bytes.

A frame is one kind and one msgpack message, which vLLM's encoder may split into several buffers so
that arrays are not copied into the message:

    1 byte   kind
    4 bytes  number of buffers b
    8·b      length of each buffer
    ...      the buffers

Integers are big-endian. There may be any number of buffers, of any size. Nothing is pickled. Before
the first frame both sides have greeted (`kvtransfer.greeting`). Owns no socket and no state of a
connection.
"""

import enum
import struct
from collections.abc import Iterator, Sequence

import msgspec
import numpy
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest

from engine.errors import ProtocolError
from engine.steps import StepSample
from kvtransfer.peers import KVPeer

PROTOCOL_VERSION = 9

_HEAD = struct.Struct(">BI")


class Kind(enum.IntEnum):
    """What a frame holds; the comment names the message type and who sends it.

    1, 2, 14 and 15 are taken: by the greeting, which goes before.
    """

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
    TRANSFERRED = 23  # list[Transferred], decode


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
    num_dropped_tokens: int = 0
    """At the end of each prompt that it hands over: it leaves them to decode, so what it samples
    is not the next token."""
    kv_bytes_per_token: float | None = None
    """In all of its ranks together; None where that is not known."""


class Transferred(msgspec.Struct, frozen=True):
    """What a decode engine has read from a prefill engine since it last said so."""

    engine_id: str
    """Of the prefill engine."""
    num_reads: int
    """Of one rank from another."""
    num_bytes: int
    seconds: float


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


def pack_frame(kind: Kind, buffers: Sequence[bytes | memoryview]) -> list[memoryview]:
    """One frame, as pieces to be written one after the other. Large buffers are not copied."""
    views = [memoryview(buffer).cast("B") for buffer in buffers]
    sizes = [view.nbytes for view in views]
    head = _HEAD.pack(kind, len(views)) + struct.pack(f">{len(views)}Q", *sizes)
    return [memoryview(head), *(view for view in views if view.nbytes)]


class FrameReader:
    """Cuts a stream of bytes into frames. Owns what has come of the frame that is not complete yet.

    Each byte is copied once, however the stream is cut. Only for streams whose sender is known: the
    frames may have any size.
    """

    def __init__(self) -> None:
        self._head = bytearray()
        self._buffers: list[memoryview] = []
        """Of the frame whose head is complete, empty or filled."""
        self._unfilled: list[memoryview] = []
        """What is to come of them, the last first."""

    def feed(self, chunk: bytes) -> Iterator[tuple[Kind, list[memoryview]]]:
        """Yields each frame that `chunk` completes.

        Raises:
            ProtocolError: a frame is malformed, or of an unknown kind.
            MemoryError: there is no room for it.
        """
        rest = memoryview(chunk)
        while rest:
            rest = self._fill(rest) if self._buffers else self._feed_head(rest)
            if self._buffers and not self._unfilled:
                frame = _kind(self._head[0]), self._buffers
                self._head, self._buffers = bytearray(), []
                yield frame

    def _feed_head(self, rest: memoryview) -> memoryview:
        rest = self._complete_head(rest, _HEAD.size)
        if len(self._head) < _HEAD.size:
            return rest
        kind, num_buffers = _HEAD.unpack_from(self._head)
        name = _kind(kind).name
        if num_buffers == 0:
            raise ProtocolError(f"{name} without a message")
        size = _HEAD.size + 8 * num_buffers
        rest = self._complete_head(rest, size)
        if len(self._head) == size:
            sizes = struct.unpack_from(f">{num_buffers}Q", self._head, _HEAD.size)
            self._buffers = [_room(size) for size in sizes]
            self._unfilled = [buffer for buffer in reversed(self._buffers) if buffer]
        return rest

    def _complete_head(self, rest: memoryview, size: int) -> memoryview:
        num_bytes = max(0, size - len(self._head))
        self._head += rest[:num_bytes]
        return rest[num_bytes:]

    def _fill(self, rest: memoryview) -> memoryview:
        room = self._unfilled.pop()
        num_bytes = min(len(room), len(rest))
        room[:num_bytes] = rest[:num_bytes]
        if num_bytes < len(room):
            self._unfilled.append(room[num_bytes:])
        return rest[num_bytes:]


def _room(num_bytes: int) -> memoryview:
    # Not a bytearray: that is written to as a whole while it is made.
    try:
        return numpy.empty(num_bytes, numpy.uint8).data
    except ValueError:
        raise MemoryError(f"no room for {num_bytes} bytes") from None


def _kind(number: int) -> Kind:
    try:
        return Kind(number)
    except ValueError:
        raise ProtocolError(f"a frame of unknown kind {number}") from None
