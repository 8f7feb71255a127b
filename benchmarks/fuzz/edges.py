"""Values at the edges of their types, and those of other types. Owns the tables."""

import random
from typing import Any

from benchmarks.fuzz.json_text import Raw, nested
from benchmarks.fuzz.schema import Api, Schema

INTEGERS: tuple[Any, ...] = (
    *(0, -1, -2, 2**31 - 1, 2**31, -(2**31) - 1, 2**32, 2**53, 2**53 + 1),
    *(2**62, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64, 10**30),
    Raw("1" + "0" * 5000),  # Python refuses to read integers this long.
)
NUMBERS: tuple[Any, ...] = (
    *(float("nan"), float("inf"), float("-inf"), -0.0, 5e-324, 1.7e308, 1e-30, 2.0000001, -1e9),
    *(Raw("1e400"), Raw("-1e400"), Raw("1E5"), Raw("0." + "1" * 5000)),
)
STRINGS: tuple[Any, ...] = (
    *("", "\ud800", "a\udfff", "\x00", "\r\n\r\n", "\u202e", "\uffff", "🙂" * 5_000, "é" * 40_000),
    *("x" * 70_000, "{{ 7 * 7 }}", "../../etc/passwd", "NaN", "true", "<|im_end|>" * 50),
)
ARRAYS: tuple[Any, ...] = (
    *([], [[]], [None], [""], ["\ud800"], [{}], [2**64], [-1], [1.5], ["x" * 70_000]),
    *([1] * 10_000, ["a"] * 10_000, [[7]] * 2_000, nested(10), nested(500), nested(50_000)),
)
OBJECTS: tuple[Any, ...] = (
    *({}, {"": None}, {"\ud800": 1}, {"a": {"b": [{"c": None}]}}, {"1": "a"}, {"-1": 1e9}),
    {str(number): number for number in range(5_000)},
    nested(10, opening='{"a":', closing="}"),
    nested(500, opening='{"a":', closing="}"),
    nested(50_000, opening='{"a":', closing="}"),
)
PLAIN: tuple[Any, ...] = (None, True, False)

BY_TYPE = {
    "integer": INTEGERS,
    "number": (*NUMBERS, *INTEGERS),
    "string": STRINGS,
    "array": ARRAYS,
    "object": OBJECTS,
    "boolean": PLAIN,
    "null": PLAIN,
}
_ALL = tuple(BY_TYPE.values())
_OWN_TYPE = 0.7


def any_edge(rng: random.Random) -> Any:
    """A value of any type."""
    return rng.choice(rng.choice(_ALL))


def edge_for(rng: random.Random, api: Api, schema: Schema) -> Any:
    """Mostly one of a type that the schema names."""
    types = _types(api, schema)
    if not types or rng.random() > _OWN_TYPE:
        return any_edge(rng)
    return rng.choice(BY_TYPE[rng.choice(types)])


def _types(api: Api, schema: Schema) -> list[str]:
    schema = api.resolve(schema)
    forms = schema.get("anyOf") or schema.get("oneOf")
    if forms is not None:
        return sorted({name for form in forms for name in _types(api, form)} - {"null"})
    return [schema["type"]] if schema.get("type") in BY_TYPE else []
