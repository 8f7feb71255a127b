"""HTTP in other frames, and clients that leave, half-close or never finish. Owns the tables."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.fuzz.bodies import COMPLETION, COMPLETIONS
from benchmarks.fuzz.http_bytes import Header, chunked, http_request
from benchmarks.fuzz.http_shots import BODY
from benchmarks.fuzz.json_text import write_json
from benchmarks.fuzz.shots import Kind, Part, Shot, Then

_DISABLED = (("X-Request-Disconnect-Disabled", "?1"),)
_TIMEOUT = (("X-Request-Timeout-Seconds", "0.5"),)
_CHUNKED = (("Transfer-Encoding", "chunked"),)
_WHOLE = http_request("POST", COMPLETIONS, BODY)
_HEAD = http_request("POST", COMPLETIONS, BODY)[: -len(BODY)]
_CHUNK_HEAD = http_request("POST", COMPLETIONS, b"", headers=_CHUNKED, content_length=False)
_KEPT = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
_LAST = http_request("GET", "/health")

_GOOD: Mapping[str, tuple[bytes, ...]] = {
    "byte by byte": tuple(_WHOLE[at : at + 1] for at in range(len(_WHOLE))),
    "head and body apart": (_HEAD, BODY),
    "chunks of one byte": (_CHUNK_HEAD + chunked(BODY, size=1),),
    "chunks": (_CHUNK_HEAD, chunked(BODY, size=7)),
    "a chunk's extension": (
        _CHUNK_HEAD + b"%x;a=b\r\n" % len(BODY) + BODY + b"\r\n0\r\nX-Trailer: 1\r\n\r\n",
    ),
    "empty lines first": (b"\r\n\r\n" + _WHOLE,),
}
_PIPELINED: Mapping[str, bytes] = {
    "five in a row": _KEPT * 4 + _LAST,
    "completions in a row": _WHOLE.replace(b"Connection: close\r\n", b"", 3) * 2 + _WHOLE,
}
_BAD: Mapping[str, tuple[bytes, ...]] = {
    "HTTP/0.9": (b"GET /health\r\n",),
    "HTTP/1.0": (http_request("POST", COMPLETIONS, BODY, version="1.0"),),
    "HTTP/9.9": (http_request("GET", "/health", version="9.9"),),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n",),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(508),),
    "the proxy protocol": (b"PROXY TCP4 1.1.1.1 2.2.2.2 1 2\r\n" + _WHOLE,),
    "bare line feeds": (_WHOLE.replace(b"\r\n", b"\n"),),
    "a chunk that is too short": (_CHUNK_HEAD + b"fff\r\n" + BODY + b"\r\n0\r\n\r\n",),
    "a chunk that is too long": (_CHUNK_HEAD + b"3\r\n" + BODY + b"\r\n0\r\n\r\n",),
    "a huge chunk": (_CHUNK_HEAD + b"ffffffffffffffff\r\n" + BODY,),
    "a chunk below zero": (_CHUNK_HEAD + b"-1\r\n" + BODY + b"\r\n0\r\n\r\n",),
    "a chunk of letters": (_CHUNK_HEAD + b"zz\r\n" + BODY + b"\r\n0\r\n\r\n",),
    "a chunk's long extension": (_CHUNK_HEAD + b"3;" + b"x" * 100_000 + b"\r\nabc\r\n0\r\n\r\n",),
    "a body that is too long": (_WHOLE + b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 3,),
    "a request in a request": (
        http_request("POST", COMPLETIONS, BODY, headers=_CHUNKED) + b"0\r\n\r\nGET / HTTP/1.1\r\n",
    ),
    "a line without end": (b"GET /" + b"x" * 500_000,),
    "nothing": (b"",),
    "zero bytes": (bytes(10_000),),
}


def framing_shot(rng: random.Random) -> Shot:
    """One request, or none, in an unusual frame."""
    name, num_answers, parts, good = rng.choice(
        [(name, 1, parts, True) for name, parts in _GOOD.items()]
        + [(name, 1, parts, False) for name, parts in _BAD.items()]
        + [
            ("five in a row", 5, (_PIPELINED["five in a row"],), True),
            ("random bytes", 1, (rng.randbytes(rng.choice((1, 10, 1_000, 60_000))),), False),
        ]
    )
    return Shot(
        kind=Kind.FRAMING,
        name=name,
        parts=tuple(Part(data=part) for part in parts),
        num_answers=num_answers,
        is_request=good,
        then=Then.READ if good else rng.choice((Then.READ, Then.HALF_CLOSE)),
    )


def client_shot(rng: random.Random) -> Shot:
    """A client that goes away too early, or stays too long."""
    name = rng.choice(sorted(_CLIENTS))
    return Shot(kind=Kind.CLIENT, name=name, **_CLIENTS[name](rng))


def _long_request(*, headers: Sequence[Header] = (), **fields: Any) -> bytes:
    body = {**COMPLETION, "max_tokens": 900, "ignore_eos": True, "stream": True, **fields}
    return http_request("POST", COMPLETIONS, write_json(body).encode(), headers=headers)


def _once(data: bytes, then: Then, *, num: int = 1, **more: Any) -> dict[str, Any]:
    return {"parts": (Part(data=data),), "then": then, "num_connections": num, **more}


def _trickle(data: bytes, *, num: int, pause_s: float) -> dict[str, Any]:
    parts = tuple(Part(data=data[at : at + 1], pause_s=pause_s) for at in range(10))
    return {"parts": parts, "then": Then.LINGER, "num_connections": num}


_CLIENTS: Mapping[str, Callable[[random.Random], dict[str, Any]]] = {
    "leaves at once": lambda rng: _once(_long_request(), Then.LEAVE),
    "leaves many choices at once": lambda rng: _once(_long_request(n=64), Then.LEAVE),
    "leaves a stream": lambda rng: _once(_long_request(), Then.LEAVE_READING),
    "leaves four choices": lambda rng: _once(_long_request(n=4), Then.LEAVE_READING),
    "leaves, disconnects disabled": lambda rng: _once(
        _long_request(n=4, stream=rng.random() < 0.5, headers=_DISABLED), Then.LEAVE
    ),
    "has a timeout": lambda rng: _once(
        _long_request(n=4, stream=rng.random() < 0.5, headers=_TIMEOUT), Then.READ, long=True
    ),
    "leaves a whole answer": lambda rng: _once(_long_request(stream=False), Then.LEAVE),
    "leaves 20 streams": lambda rng: _once(_long_request(), Then.LEAVE_READING, num=20),
    "leaves amid the head": lambda rng: _once(_HEAD[: rng.randrange(len(_HEAD))], Then.LEAVE),
    "leaves amid the body": lambda rng: _once(_WHOLE[: -rng.randrange(1, 40)], Then.LEAVE),
    "half-closes": lambda rng: _once(_WHOLE, Then.HALF_CLOSE),
    "half-closes a stream": lambda rng: _once(_long_request(), Then.HALF_CLOSE, long=True),
    "half-closes amid the body": lambda rng: _once(_WHOLE[:-9], Then.HALF_CLOSE),
    "never says anything": lambda rng: _once(b"", Then.LINGER, num=rng.choice((1, 200))),
    "never ends the head": lambda rng: _once(_HEAD[:60], Then.LINGER, num=rng.choice((1, 200))),
    "never ends the body": lambda rng: _once(_WHOLE[:-9], Then.LINGER, num=rng.choice((1, 200))),
    "sends the head slowly": lambda rng: _trickle(_HEAD, num=50, pause_s=0.3),
    "never ends a chunk": lambda rng: _once(_CHUNK_HEAD + b"fff\r\nabc", Then.LINGER, num=20),
    "does not read": lambda rng: _once(_long_request(n=2, logprobs=5), Then.LINGER),
}
