"""Grammars, patterns, schemas and templates that take long, never end, or end their compiler.

Owns the tables of them, and the fields that carry them.
"""

import random
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.fuzz.bodies import CHAT, CHAT_COMPLETIONS, COMPLETION, COMPLETIONS, post
from benchmarks.fuzz.json_text import nested, write_json
from benchmarks.fuzz.shots import Kind, Shot

PATTERNS: Mapping[str, str] = {
    "32,000 parentheses": "(" * 32_000 + "a" + ")" * 32_000,
    "1,000 parentheses": "(" * 1_000 + "a" + ")" * 1_000,
    "14,000 alternations": "(" * 14_000 + "a" + "|b)" * 14_000,
    "never closed": "(" * 32_000,
    "quantifiers of quantifiers": "(a+)+$",
    "counts of counts": "(((a{1,100}){1,100}){1,100}){1,100}",
    "a count": "a{1,1000000}",
    "a huge count": "a{99999999999999999999}",
    "20,000 empty alternatives": "|" * 20_000,
    "50,000 dots": "." * 50_000,
    "optional ones": "a?" * 3_000 + "a" * 3_000,
    "a set never closed": "[",
    "a lookbehind": "(?<=a)b(?!c)",
    "a back reference": r"(a)\1\99",
    "letters": r"\p{L}+\p{Nonsense}",
    "a range backwards": "[z-a]",
    "a surrogate": "\ud800",
    "a zero byte": "a\x00b",
    "nothing": "",
    "all of Unicode": "[\\u0000-\\U0010ffff]{1,500}",
}

GRAMMARS: Mapping[str, str] = {
    "left recursion": 'root ::= root "a" | "b"',
    "itself": "root ::= root",
    "a circle": "root ::= a\na ::= b\nb ::= a",
    "no root": 'a ::= "b"',
    "a rule that is missing": "root ::= nowhere",
    "nothing": "",
    "no rule": "{}",
    "never closed": 'root ::= "a',
    "32,000 parentheses": "root ::= " + "(" * 32_000 + '"a"' + ")" * 32_000,
    "20,000 alternatives": "root ::= " + " | ".join(f'"a{number}"' for number in range(20_000)),
    "5,000 rules": "root ::= r0\n"
    + "\n".join(f'r{number} ::= r{number + 1} | "a"' for number in range(5_000))
    + '\nr5000 ::= "b"',
    "empty for ever": 'root ::= ("")* "a"',
    "a huge count": 'root ::= "a"{1,100000000}',
    "a surrogate": 'root ::= "\ud800"',
    "Lark": 'start: "a" start | "b"',
}

SCHEMAS: Mapping[str, Any] = {
    "itself": {"$ref": "#"},
    "a reference that is missing": {"$ref": "#/definitions/nowhere"},
    "a reference outside": {"$ref": "http://127.0.0.1:1/schema.json"},
    "a circle": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    "a tree": {
        "type": "object",
        "properties": {"next": {"$ref": "#"}},
        "required": ["next"],
    },
    "a type that is none": {"type": "nonsense"},
    "a type that is a number": {"type": 7},
    "properties that are none": {"type": "object", "properties": 7},
    "20,000 values": {"enum": [f"v{number}" for number in range(20_000)]},
    "2,000 properties": {
        "type": "object",
        "properties": {f"p{number}": {"type": "string"} for number in range(2_000)},
        "required": [f"p{number}" for number in range(2_000)],
    },
    "1,000 alternatives": {"anyOf": [{"const": number} for number in range(1_000)]},
    "alternatives of alternatives": {
        "anyOf": [{"anyOf": [{"type": "object", "properties": {"a": {}}}] * 30}] * 30
    },
    "much at once": {"allOf": [{"type": "object"}] * 1_000},
    "a thousand million items": {"type": "array", "minItems": 10**9, "items": {"type": "null"}},
    "a thousand million characters": {"type": "string", "minLength": 10**9, "maxLength": 10**9},
    "ends of integers": {"type": "integer", "minimum": -(2**63) - 1, "maximum": 2**64},
    "a range backwards": {"type": "integer", "minimum": 5, "maximum": 3},
    "ends that are none": {"type": "number", "minimum": float("nan"), "maximum": float("inf")},
    "a format that is none": {"type": "string", "format": "nonsense"},
    "a surrogate": {"const": "\ud800"},
    "nothing": {},
    "false": False,
    "a string": "{",
    "deep, 200": nested(200, opening='{"type":"array","items":', closing="}", core="{}"),
    "deep, 5,000": nested(5_000, opening='{"type":"array","items":', closing="}", core="{}"),
    "pattern properties": {
        "type": "object",
        "patternProperties": {"(a+)+$": {"type": "string"}},
        "minProperties": 3,
    },
}

TEMPLATES: Mapping[str, str] = {
    "a long loop": "{% for i in range(9999) %}{% for j in range(9999) %}x{% endfor %}{% endfor %}",
    "a huge range": "{% for i in range(10**12) %}{% endfor %}",
    "a huge text": "{{ 'x' * 10**9 }}",
    "a huge number": "{{ 10 ** 10 ** 8 }}",
    "never closed": "{% for",
    "itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "attributes": "{{ ''.__class__.__mro__ }}",
    "an error of its own": "{{ raise_exception('no') }}",
    "5,000 parentheses": "{{ " + "(" * 5_000 + "1" + ")" * 5_000 + " }}",
    "nothing": "",
}


_Carried = tuple[Callable[[Any], Mapping[str, Any]], Mapping[str, Any]]

_COMPLETION_FIELDS: Mapping[str, _Carried] = {
    "regex": (lambda text: {"structured_outputs": {"regex": text}}, PATTERNS),
    "grammar": (lambda text: {"structured_outputs": {"grammar": text}}, GRAMMARS),
    "schema": (lambda schema: {"structured_outputs": {"json": schema}}, SCHEMAS),
    "schema's pattern": (
        lambda text: {"structured_outputs": {"json": {"type": "string", "pattern": text}}},
        PATTERNS,
    ),
    "white space": (
        lambda text: {"structured_outputs": {"json": {}, "whitespace_pattern": text}},
        PATTERNS,
    ),
    "choice": (
        lambda words: {"structured_outputs": {"choice": words}},
        {
            "nothing": [],
            "an empty one": [""],
            "10,000": [f"w{number}" for number in range(10_000)],
            "a surrogate": ["\ud800"],
            "a long one": ["x" * 200_000],
            "quotes": ['"', "\\", "\n", "'"],
        },
    ),
    "structural tag": (
        lambda text: {"structured_outputs": {"structural_tag": text}},
        {
            "nothing": "",
            "an empty object": "{}",
            "no structures": '{"structures": [], "triggers": []}',
            "a number": "7",
            "deep": '{"type": "structural_tag", "format": ' + "[" * 2_000 + "]" * 2_000 + "}",
        },
    ),
    "all at once": (
        lambda text: {"structured_outputs": {"regex": text, "grammar": text, "choice": [text]}},
        GRAMMARS,
    ),
}
_CHAT_FIELDS: Mapping[str, _Carried] = {
    "response format": (
        lambda schema: {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": schema, "strict": True},
            }
        },
        SCHEMAS,
    ),
    "tool": (
        lambda schema: {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
            "tool_choice": "required",
        },
        SCHEMAS,
    ),
    "tool's pattern": (
        lambda text: {
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": "f",
                        "parameters": {
                            "type": "object",
                            "properties": {"a": {"type": "string", "pattern": text}},
                            "required": ["a"],
                        },
                    },
                }
            ],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
        },
        PATTERNS,
    ),
    "template": (lambda text: {"chat_template": text}, TEMPLATES),
    "template's argument": (
        lambda text: {"chat_template_kwargs": {"chat_template": text, "tokenize": True}},
        TEMPLATES,
    ),
}


def deadly_bodies() -> list[tuple[str, bytes]]:
    """Each of them once in one field that takes it: the path, and the body."""
    return [
        (path, write_json({**base, **carry(value)}).encode())
        for path, base, fields in (
            (COMPLETIONS, COMPLETION, _COMPLETION_FIELDS),
            (CHAT_COMPLETIONS, CHAT, _CHAT_FIELDS),
        )
        for carry, table in fields.values()
        for value in table.values()
    ]


def deadly_shot(rng: random.Random) -> Shot:
    """One of them, in one of the fields that take it."""
    chat = rng.random() < 0.4
    fields = _CHAT_FIELDS if chat else _COMPLETION_FIELDS
    field = rng.choice(sorted(fields))
    carry, table = fields[field]
    name = rng.choice(sorted(table))
    body = {**(CHAT if chat else COMPLETION), **carry(table[name])}
    path = CHAT_COMPLETIONS if chat else COMPLETIONS
    if rng.random() < 0.3:
        body["stream"] = True
    return post(Kind.DEADLY, path, body, name=f"{field}: {name}")
