"""Bytes for ports that speak no HTTP, or not to strangers. Owns how they are made.

It knows how ZeroMQ greets and how a frame of length and content looks, so that some of what it
sends is read a little further.
"""

import random
from collections.abc import Callable, Mapping

import msgspec

from benchmarks.fuzz.bodies import COMPLETIONS
from benchmarks.fuzz.http_bytes import http_request
from benchmarks.fuzz.http_shots import BODY
from benchmarks.fuzz.shots import Kind, Part, Shot, Then

_ZMTP_GREETING = (
    b"\xff" + bytes(7) + b"\x01\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31)
)
_READY = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
_ZMTP_READY = b"\x04" + bytes([len(_READY)]) + _READY
_MORE, _LAST = b"\x01", b"\x00"
_MSGPACK = msgspec.msgpack.encode({"a": [1, "b", None, 2.5], "engine_id": "x" * 50})

_DEEP = b"\x91" * 3_000 + b"\xc0"
_HUGE_MAP = b"\xdf\xff\xff\xff\xff"


def port_shot(rng: random.Random) -> Shot:
    """Something for one of the cluster's own ports."""
    name = rng.choice(sorted(_MADE))
    silent = name == "nothing"
    return Shot(
        kind=Kind.PORT,
        name=name,
        parts=(Part(data=_MADE[name](rng)),),
        then=Then.LINGER if silent else rng.choice((Then.READ, Then.LEAVE, Then.HALF_CLOSE)),
        port=rng.random(),
        num_connections=rng.choice((1, 100)) if silent else rng.choice((1, 1, 1, 20)),
    )


def _random_bytes(rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice((1, 4, 100, 5_000, 500_000)))


def _framed(rng: random.Random) -> bytes:
    """A length, a kind, a number of buffers and their lengths, and what may be a message."""
    body = rng.choice((_MSGPACK, _MSGPACK[:-5], _DEEP, _HUGE_MAP, rng.randbytes(50), _hello(rng)))
    num_buffers = rng.choice((0, 1, 1, 1, 255))
    lengths = b"".join(len(body).to_bytes(4, "big") for _ in range(min(num_buffers, 1)))
    rest = bytes([rng.randrange(16), num_buffers]) + lengths + body
    length = rng.choice((len(rest), len(rest), 0, 1, 2**31, 2**32 - 1))
    return length.to_bytes(4, "big") + rest


def _hello(rng: random.Random) -> bytes:
    """A stranger's greeting, right in all but the proof, or not quite."""
    said = {
        "version": rng.choice((1, 8, 2**63, -1, None, "1")),
        "name": rng.choice(("x", "x" * 3_500, "\0", "", 7)),
        "wanted": rng.choice(("x", "", None)),
        "nonce": rng.choice((bytes(32), b"", "x")),
        "proof": rng.choice((bytes(32), b"", "x")),
    }
    return msgspec.msgpack.encode(said)


def _zeromq(rng: random.Random) -> bytes:
    """A greeting, and messages of one to five frames that may be anything."""
    sent = _ZMTP_GREETING + _ZMTP_READY
    for _ in range(rng.randint(1, 4)):
        frames = [
            rng.choice((b"", b"get_meta_msg", _MSGPACK, _MSGPACK[:-5], rng.randbytes(30), b"\xc1"))
            for _ in range(rng.randint(1, 5))
        ]
        for number, frame in enumerate(frames, start=1):
            flags = _LAST if number == len(frames) else _MORE
            sent += flags + bytes([len(frame)]) + frame
    return sent


_MADE: Mapping[str, Callable[[random.Random], bytes]] = {
    "random bytes": _random_bytes,
    "frames": lambda rng: b"".join(_framed(rng) for _ in range(rng.randint(1, 3))),
    "a msgpack message, cut": lambda rng: _MSGPACK[: rng.randrange(1, len(_MSGPACK))],
    "ZeroMQ": _zeromq,
    "ZeroMQ, cut": lambda rng: _zeromq(rng)[: rng.randrange(1, 150)],
    "HTTP": lambda rng: http_request("GET", rng.choice(("/", "/metrics", "/health"))),
    "a completion": lambda rng: http_request("POST", COMPLETIONS, BODY),
    "TLS": lambda rng: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(508),
    "zero bytes": lambda rng: bytes(rng.choice((1, 1_000, 1_000_000))),
    "ones": lambda rng: b"\xff" * rng.choice((4, 64, 100_000)),
    "a pickle": lambda rng: b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
    "nothing": lambda rng: b"",
}
