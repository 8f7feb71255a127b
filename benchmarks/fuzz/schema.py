"""The API's own OpenAPI schema: its routes, and values that its schemas allow.

Owns the reading of the schema. It knows JSON Schema as far as FastAPI writes it.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.systems import SERVED_NAME

Schema = Mapping[str, Any]
Maker = Callable[[random.Random], Any]

_WORDS = ("a", "river", "Once upon a time", "", "7", "été", "水", "\n", "<|im_end|>", "🙂")
_MAX_DEPTH = 6
_OPTIONAL = 0.12
"""How likely a field is present that may be absent: there are dozens."""
_CHEAP_LIMIT = 16
_BOUNDS = frozenset({"max_tokens", "max_output_tokens"})
"""Without one an answer is as long as the model lets it be: nothing that a fuzz run learns from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One method of one path; `body` is the schema of its JSON body, if it has one."""

    method: str
    path: str
    body: Schema | None


class Api:
    """The routes and schemas of an OpenAPI document."""

    def __init__(self, document: Schema) -> None:
        self._schemas: Schema = document.get("components", {}).get("schemas", {})
        self.routes = tuple(_routes(document))
        self.with_body = tuple(route for route in self.routes if route.body is not None)

    def resolve(self, schema: Schema) -> Schema:
        """The schema itself, where this one refers to another."""
        while "$ref" in schema:
            schema = self._schemas[schema["$ref"].rpartition("/")[2]]
        return schema

    def fields(self, rng: random.Random, route: Route) -> Mapping[str, Schema]:
        """The fields of a route's body, of one of its forms."""
        schema = self.resolve(route.body or {})
        while forms := schema.get("anyOf") or schema.get("oneOf"):
            schema = self.resolve(rng.choice(forms))
        properties: Mapping[str, Schema] = schema.get("properties", {})
        return properties

    def value(self, rng: random.Random, schema: Schema, *, name: str = "", depth: int = 0) -> Any:
        """A random value that the schema allows, if it is a possible one.

        Names that cost work have small values, so that a run is many requests and not one.
        """
        schema = self.resolve(schema)
        if name in _USUAL and rng.random() < 0.9:
            return _USUAL[name](rng)
        if forms := schema.get("anyOf") or schema.get("oneOf"):
            return self.value(rng, rng.choice(forms), name=name, depth=depth)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return rng.choice(schema["enum"])
        match schema.get("type"):
            case "object":
                return self._object(rng, schema, depth)
            case "array":
                return self._array(rng, schema, depth)
            case "integer" | "number":
                return _number(rng, schema)
            case "string":
                return _string(rng, schema)
            case "boolean":
                return rng.random() < 0.5
            case "null":
                return None
        return rng.choice((None, 1, "a", {}, []))

    def _object(self, rng: random.Random, schema: Schema, depth: int) -> dict[str, Any]:
        required = schema.get("required", ())
        properties: Schema = schema.get("properties", {})
        chance = _OPTIONAL if depth < _MAX_DEPTH else 0.0
        bounds = _BOUNDS if depth == 0 else frozenset()
        made = {
            name: self.value(rng, each, name=name, depth=depth + 1)
            for name, each in properties.items()
            if name in required or name in bounds or rng.random() < chance
        }
        more = schema.get("additionalProperties")
        if isinstance(more, Mapping) and depth < _MAX_DEPTH:
            for _ in range(rng.randrange(3)):
                made[rng.choice(_WORDS)] = self.value(rng, more, depth=depth + 1)
        return made

    def _array(self, rng: random.Random, schema: Schema, depth: int) -> list[Any]:
        least = schema.get("minItems", 0)
        most = min(schema.get("maxItems", 3), 3) if depth < _MAX_DEPTH else least
        num = rng.randint(least, max(least, most))
        items = schema.get("items", {})
        return [self.value(rng, items, depth=depth + 1) for _ in range(num)]


def _routes(document: Schema) -> Iterator[Route]:
    for path, methods in sorted(document["paths"].items()):
        for method, operation in sorted(methods.items()):
            content = operation.get("requestBody", {}).get("content", {})
            body = content.get("application/json", {}).get("schema")
            # Some routes read the body themselves and say nothing of it.
            yield Route(method=method.upper(), path=path, body=body or None)


def _number(rng: random.Random, schema: Schema) -> int | float:
    # vLLM writes the ends of int64 as floats, which are outside.
    low = max(schema.get("minimum", schema.get("exclusiveMinimum", -2)), -(2**53))
    high = min(schema.get("maximum", schema.get("exclusiveMaximum", low + 100)), 2**53)
    if schema["type"] == "integer":
        return rng.choice((rng.randint(math.ceil(low), math.floor(high)), math.ceil(low), 1))
    return rng.choice((rng.uniform(low, high), float(low), 0.0, 1.0))


def _string(rng: random.Random, schema: Schema) -> str:
    text = rng.choice(_WORDS) * rng.choice((1, 1, 1, 20))
    least, most = int(schema.get("minLength", 0)), int(schema.get("maxLength", 200))
    return text[:most].ljust(least, "x")


def _few(rng: random.Random) -> int:
    return rng.randint(1, _CHEAP_LIMIT)


def _messages(rng: random.Random) -> list[dict[str, Any]]:
    roles = ("user", "user", "system", "assistant")
    words = [{"role": rng.choice(roles), "content": rng.choice(_WORDS)} for _ in range(2)]
    return [*words, {"role": "user", "content": "Where does the river begin?"}]


_USUAL: Mapping[str, Maker] = {
    "model": lambda rng: SERVED_NAME,
    "max_tokens": _few,
    "max_completion_tokens": _few,
    "max_output_tokens": _few,
    "min_tokens": lambda rng: rng.randint(0, 4),
    "n": lambda rng: rng.randint(1, 3),
    "messages": _messages,
    "prompt": lambda rng: rng.choice(("Once upon a time", [5, 6, 7], ["a", "b"], [[5, 6], [7, 8]])),
    "input": lambda rng: "Once upon a time",
    "thinking_token_budget": lambda rng: rng.choice((None, 4)),
}
"""Without these nearly every request that a schema allows would be refused at once."""
