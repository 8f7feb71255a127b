"""What is sent once: bytes, when, over how many connections, and what the client does then.

Owns the records and their form in a file. Bytes, not requests: much of what is sent is no request.
"""

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

_SHOWN_BYTES = 200
_LOOKED_BYTES = 1_000
_USUAL = re.compile(
    rb"(Host: 127|Connection: close|Content-Type: app|Content-Length: \d)[^\r]*\r\n"
)


class Kind(Enum):
    """The families of what is sent. The value is the name in the report."""

    VALID = "valid by the schema"
    EDGE = "one field at an edge"
    MUTATED = "mutated body"
    BROKEN = "no JSON, or not quite"
    DEADLY = "grammars, patterns, schemas, templates"
    CROWD = "many choices, prompts, stop strings"
    PATH = "methods and paths"
    HEADERS = "headers"
    FRAMING = "framing of HTTP"
    CLIENT = "clients that leave or never finish"
    PORT = "bytes at other ports"


class Then(Enum):
    """What the client does when it has sent everything."""

    READ = "reads the answer"
    LEAVE = "goes away without an answer"
    LEAVE_READING = "goes away when an answer has begun"
    HALF_CLOSE = "closes its side, and reads"
    LINGER = "says nothing more until the round ends"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Bytes that are sent after a pause."""

    data: bytes
    pause_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shot:
    """One thing that is sent.

    `port` is None for the front door; else it says which of the cluster's other ports, as a place
    in [0, 1) of their list. `is_request` says that this is a well-formed request, which must be
    answered; one that is `long` may take longer than anybody waits.
    """

    kind: Kind
    name: str
    parts: tuple[Part, ...]
    then: Then = Then.READ
    port: float | None = None
    num_connections: int = 1
    num_answers: int = 1
    is_request: bool = False
    long: bool = False
    has_no_body: bool = False
    """Whether its answer has none, as that to HEAD."""

    def shown(self) -> str:
        """Its beginning, for a screen, without the headers that all have."""
        data = b"".join(part.data for part in self.parts)
        told = _USUAL.sub(b"", data[:_LOOKED_BYTES])
        more = f"... {len(data)} bytes" if len(told) > _SHOWN_BYTES else ""
        return f"{told[:_SHOWN_BYTES].decode('latin-1')!r}{more}"

    def as_json(self) -> Mapping[str, Any]:
        """The whole of it, for a file."""
        return {
            "kind": self.kind.name,
            "name": self.name,
            "then": self.then.name,
            "port": self.port,
            "num_connections": self.num_connections,
            "parts": [
                {"base64": base64.b64encode(part.data).decode(), "pause_s": part.pause_s}
                for part in self.parts
            ],
        }
