"""Bodies for the API's routes: allowed ones, one field at an edge, mutated, broken, crowded.

Owns how they are made; which shot comes when is `sequence`'s.
"""

import gzip
import random
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.fuzz.edges import any_edge, edge_for
from benchmarks.fuzz.http_bytes import Header, http_request
from benchmarks.fuzz.json_text import Raw, nested, write_json
from benchmarks.fuzz.schema import Api, Route
from benchmarks.fuzz.shots import Kind, Part, Shot
from benchmarks.systems import SERVED_NAME

PROMPT = "Once upon a time"
COMPLETION: Mapping[str, Any] = {"model": SERVED_NAME, "prompt": PROMPT, "max_tokens": 8}
CHAT: Mapping[str, Any] = {
    "model": SERVED_NAME,
    "messages": [{"role": "user", "content": "Where does the river begin?"}],
    "max_tokens": 8,
}
COMPLETIONS = "/v1/completions"
CHAT_COMPLETIONS = "/v1/chat/completions"
_PREFERRED = (COMPLETIONS, CHAT_COMPLETIONS)
"""The routes that most requests go to, here as elsewhere."""
_NOT_FILLED = "{"
_OF_LENGTH = frozenset({"max_tokens", "max_completion_tokens", "max_output_tokens", "n"})
"""At an edge these may be refused, or ask for the longest answer that there is."""


def post(
    kind: Kind, path: str, fields: Mapping[str, Any], *, name: str, long: bool = False
) -> Shot:
    """A well-formed request with a JSON body of any content."""
    return post_text(kind, path, write_json(fields).encode(), name=name, long=long)


def post_text(
    kind: Kind,
    path: str,
    body: bytes,
    *,
    name: str,
    long: bool = False,
    headers: tuple[Header, ...] = (),
) -> Shot:
    """A well-formed request with any body."""
    return Shot(
        kind=kind,
        name=f"POST {path}: {name}",
        parts=(Part(data=http_request("POST", path, body, headers=headers)),),
        is_request=True,
        long=long,
    )


def valid_shot(rng: random.Random, api: Api) -> Shot:
    """A body that the schema allows."""
    route = _route(rng, api)
    body = api.value(rng, route.body or {})
    return post(Kind.VALID, route.path, body, name="by the schema")


def edge_shot(rng: random.Random, api: Api) -> Shot:
    """An ordinary body, one of whose fields is at an edge of its type or of another one."""
    route = _route(rng, api)
    fields = api.fields(rng, route)
    if not fields:
        return valid_shot(rng, api)
    name = rng.choice(sorted(fields))
    value = edge_for(rng, api, fields[name])
    body = ordinary_body(rng, api, route) | {name: value}
    if rng.random() < 0.2 and "stream" in fields:
        body["stream"] = True
    return post(
        Kind.EDGE,
        route.path,
        body,
        name=f"{name} is {_short(value)}",
        long=name in _OF_LENGTH,
    )


def mutated_shot(rng: random.Random, api: Api) -> Shot:
    """An allowed body, changed in one to three places anywhere in it."""
    route = _route(rng, api)
    body = api.value(rng, route.body or {})
    for _ in range(rng.randint(1, 3)):
        body = mutated(rng, body)
    return post(Kind.MUTATED, route.path, body, name="mutated")


def mutated(rng: random.Random, value: Any) -> Any:
    """The value with one change, at the top or below."""
    if isinstance(value, dict) and value and rng.random() < 0.93:
        key = rng.choice(list(value))
        match rng.randrange(6):
            case 0:
                return {name: each for name, each in value.items() if name != key}
            case 1:
                return value | {rng.choice(("unknown", "", "\ud800", "__class__")): value[key]}
            case _:
                return value | {key: mutated(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        match rng.randrange(4):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return value * rng.choice((2, 100))
            case _:
                return [*value[:at], mutated(rng, value[at]), *value[at + 1 :]]
    return any_edge(rng)


def broken_shot(rng: random.Random, api: Api) -> Shot:
    """A body that is no JSON, or JSON as nobody writes it."""
    route = _route(rng, api)
    text = write_json(ordinary_body(rng, api, route))
    name = rng.choice(sorted(_BREAKS))
    headers = (("Content-Encoding", "gzip"),) if name == "compressed" else ()
    body = _BREAKS[name](rng, text)
    return post_text(Kind.BROKEN, route.path, body, name=name, headers=headers)


def crowd_shot(rng: random.Random, api: Api) -> Shot:
    """Much in one request: choices, prompts, stop strings, words, messages, tools."""
    name = rng.choice(sorted(_CROWDS))
    path = CHAT_COMPLETIONS if name.startswith("chat") else COMPLETIONS
    fields = {**(CHAT if path == CHAT_COMPLETIONS else COMPLETION), **_CROWDS[name]}
    return post(Kind.CROWD, path, fields, name=name, long=True)


def ordinary_body(rng: random.Random, api: Api, route: Route) -> dict[str, Any]:
    """A small body that is answered, where such a one is known."""
    if route.path == COMPLETIONS:
        return dict(COMPLETION)
    if route.path in (CHAT_COMPLETIONS, "/v1/messages"):
        return dict(CHAT)
    body = api.value(rng, route.body or {})
    return body if isinstance(body, dict) else {}


def _route(rng: random.Random, api: Api) -> Route:
    routes = [route for route in api.with_body if _NOT_FILLED not in route.path]
    preferred = [route for route in routes if route.path in _PREFERRED]
    return rng.choice(preferred if preferred and rng.random() < 0.6 else routes)


def _short(value: Any) -> str:
    text = write_json(value)
    return text if len(text) <= 40 else f"{text[:30]}… ({len(text)} characters)"


def _flipped(rng: random.Random, text: str) -> bytes:
    data = bytearray(text.encode())
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


_BREAKS: Mapping[str, Callable[[random.Random, str], bytes]] = {
    "cut": lambda rng, text: text[: rng.randrange(len(text))].encode(),
    "bytes changed": _flipped,
    "comma too many": lambda rng, text: (text[:-1] + ",}").encode(),
    "a key twice": lambda rng, text: ('{"model": 1, "n": 2, ' + text[1:]).encode(),
    "a byte order mark": lambda rng, text: b"\xef\xbb\xbf" + text.encode(),
    "UTF-16": lambda rng, text: text.encode("utf-16"),
    "no UTF-8": lambda rng, text: text.encode().replace(b"a", b"\xff\xc0", 1),
    "surrogates as bytes": lambda rng, text: text.encode().replace(b"a", b"\xed\xa0\x80", 1),
    "nothing": lambda rng, text: b"",
    "null": lambda rng, text: b"null",
    "a list": lambda rng, text: b"[" + text.encode() + b"]",
    "a number": lambda rng, text: b"1",
    "a string": lambda rng, text: b'"a"',
    "NaN": lambda rng, text: b"NaN",
    "a long integer": lambda rng, text: b'{"n": 1' + b"0" * 200_000 + b"}",
    "twice": lambda rng, text: text.encode() * 2,
    "zero bytes": lambda rng, text: bytes(1000),
    "single quotes": lambda rng, text: text.replace('"', "'").encode(),
    "compressed": lambda rng, text: gzip.compress(text.encode(), mtime=0),
    "deep, 1,000": lambda rng, text: nested(1_000).text.encode(),
    "deep, 100,000": lambda rng, text: nested(100_000).text.encode(),
    "deep objects, 100,000": lambda rng, text: nested(
        100_000, opening='{"a":', closing="}"
    ).text.encode(),
    "deep, never closed": lambda rng, text: b"[" * 100_000,
    "deep in a field": lambda rng, text: write_json(
        {**COMPLETION, "metadata": nested(100_000)}
    ).encode(),
    "8 MB of text": lambda rng, text: write_json({**COMPLETION, "prompt": "a " * 2**22}).encode(),
    "50,000 unknown fields": lambda rng, text: write_json(
        {**COMPLETION, **{f"f{number}": 1 for number in range(50_000)}}
    ).encode(),
}

_CROWDS: Mapping[str, Mapping[str, Any]] = {
    **{f"n {n}": {"n": n, "max_tokens": 1, "temperature": 1} for n in (129, 1000, 8192, 16384)},
    "n 10**6": {"n": 10**6, "max_tokens": 1, "temperature": 1},
    "n 128 streamed": {"n": 128, "max_tokens": 2, "temperature": 1, "stream": True},
    "512 prompts": {"prompt": [[5, 6, 7, 10 + number % 200] for number in range(512)]},
    "20,000 empty prompts": {"prompt": [""] * 20_000, "max_tokens": 1},
    "512 prompts, prompt logprobs": {
        "prompt": [[5, 6, 7, 8, 10 + number % 200] for number in range(512)],
        "max_tokens": 1,
        "prompt_logprobs": 20,
    },
    "400 prompts, echo": {
        "prompt": [[(j * 7 + i) % 500 + 10 for j in range(70)] for i in range(400)],
        "max_tokens": 1,
        "echo": True,
        "logprobs": 1,
    },
    "100 prompts, 20 each": {"prompt": ["a"] * 100, "n": 20, "max_tokens": 1, "temperature": 1},
    "a prompt too long": {"prompt": [7] * 100_000},
    "a prompt of 2 MB": {"prompt": "river " * 350_000},
    "100,000 stop strings": {"stop": [f"s{number}" for number in range(100_000)]},
    "1,000 long stop strings": {"stop": ["s" * 1_000 + str(number) for number in range(1_000)]},
    "100,000 bad words": {"bad_words": [f"w{number}" for number in range(100_000)]},
    "100,000 stop tokens": {"stop_token_ids": list(range(100_000))},
    "100,000 allowed tokens": {"allowed_token_ids": list(range(100_000))},
    "100,000 biases": {"logit_bias": {str(number): 1 for number in range(100_000)}},
    "a long request id": {"request_id": "x" * 5_000_000},
    "a long user": {"user": "x" * 5_000_000},
    "a long cache salt": {"cache_salt": "x" * 1_000_000},
    "logprobs 10,000, streamed": {"logprobs": 10_000, "stream": True},
    "logprobs of all": {"logprobs": -1, "prompt_logprobs": -1},
    "internal parameters": {"kv_transfer_params": {"do_remote_prefill": True, "remote_port": 1}},
    "internal extra arguments": {"vllm_xargs": {"kv_transfer_params": "x", "a": [1]}},
    "embeds that are none": {"prompt_embeds": "AAAA", "prompt": None},
    "embeds, a pickle": {"prompt_embeds": "gASVAgAAAAAAAABLAS4=", "prompt": None},
    "chat, 5,000 messages": {"messages": [{"role": "user", "content": "a"}] * 5_000},
    "chat, 20,000 parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 20_000}]
    },
    "chat, 5,000 tools": {
        "tools": [
            {"type": "function", "function": {"name": f"f{number}", "parameters": {}}}
            for number in range(5_000)
        ],
        "tool_choice": "required",
    },
    "chat, an image": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}}],
            }
        ]
    },
    "chat, an image that is none": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
                ],
            }
        ]
    },
    "chat, deep content": {"messages": [{"role": "user", "content": Raw("[" * 900 + "]" * 900)}]},
}
