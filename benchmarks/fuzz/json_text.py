"""JSON as text, with room for what no JSON library writes. Owns `Raw`."""

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Raw:
    """Text that is written as it stands: 1e400, 100,000 brackets, a key twice."""

    text: str


def write_json(value: Any) -> str:
    """ASCII; NaN, infinities and lone surrogates as Python writes them."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, dict):
        pairs = (f"{json.dumps(key)}: {write_json(each)}" for key, each in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(write_json, value)) + "]"
    return json.dumps(value)


def nested(depth: int, *, opening: str = "[", closing: str = "]", core: str = "1") -> Raw:
    """Brackets in brackets."""
    return Raw(opening * depth + core + closing * depth)
