"""What travels between a router and its zygote: frames of a length and one msgpack message.

Nothing is pickled: a child that runs a client's text is not to be trusted.
"""

import struct
from typing import TypeVar

import msgspec

HEAD = struct.Struct(">I")

MAX_OUTPUT_BYTES = 32 * 1024 * 1024
"""What a child may answer. A chat template can make more text than any prompt holds."""

T = TypeVar("T")


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """Router to zygote: one task for one child."""

    job_id: int
    task: str
    """A name in `router.sandbox.tasks`."""
    payload: bytes
    """JSON, which carries any text that a client's JSON did, lone surrogates as well."""
    cpu_s: float
    wall_s: float
    memory_bytes: int
    """Beyond what the zygote itself has."""


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """Zygote to router: how a child ended."""

    job_id: int
    exit_code: int
    """Negative: the signal that ended it."""
    output: bytes
    was_killed: bool = False
    """It overran its wall time."""
    was_started: bool = True


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A child's own word, in JSON: a result, or why there is none."""

    result: msgspec.Raw = msgspec.Raw(b"null")
    refusal: str | None = None
    parameter: str | None = None
    is_out_of_memory: bool = False


def frame(message: msgspec.Struct) -> bytes:
    body = msgspec.msgpack.encode(message)
    return HEAD.pack(len(body)) + body


def parse(body: bytes, kind: type[T]) -> T:
    """Raises msgspec.ValidationError, msgspec.DecodeError."""
    return msgspec.msgpack.decode(body, type=kind)
