"""Asks a server and brings its answer into a form that can be compared with another server's.

Owns what may differ between two equal answers: ids, times, how a stream is cut into chunks, and
the last digits of a float.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import httpx

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

LOGPROB_TOLERANCE = 1e-2
UNIQUE_KEYS = {"id", "created", "system_fingerprint"}
"""What no two answers of even one server have in common."""
CONCATENATED_KEYS = {"text", "content", "reasoning", "arguments"}
"""Texts that a stream brings piece by piece; other texts come whole."""


async def ask(
    client: httpx.AsyncClient, url: str, endpoint: str, body: Mapping[str, Any]
) -> dict[str, Any]:
    """The answer's comparable parts; a stream's chunks are put together. Errors are raised."""
    if body.get("stream"):
        return await _ask_stream(client, url + endpoint, body)
    response = await client.post(url + endpoint, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = comparable(response.json())
    return answer


async def _ask_stream(
    client: httpx.AsyncClient, url: str, body: Mapping[str, Any]
) -> dict[str, Any]:
    answer: dict[str, Any] = {"choices": {}}
    async with client.stream("POST", url, json=body) as response:
        assert response.status_code == 200, await response.aread()
        data = ""
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                continue
            chunk = comparable(json.loads(data))
            assert "error" not in chunk, chunk
            for choice in chunk.pop("choices"):
                index = choice["index"]
                answer["choices"][index] = _join(answer["choices"].get(index), choice)
            answer = _join(answer, chunk)
        assert data == "[DONE]"
    return answer


def comparable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: comparable(each) for key, each in value.items() if key not in UNIQUE_KEYS}
    if isinstance(value, list):
        return [comparable(each) for each in value]
    return value


def _join(old: Any, new: Any, key: str = "") -> Any:
    """One value of a stream, from what came before and the newest chunk."""
    if new is None:
        return old
    if key == "tool_calls":
        return _join_tool_calls(old or [], new)
    if isinstance(new, dict):
        old = old or {}
        return old | {name: _join(old.get(name), each, name) for name, each in new.items()}
    if old is not None and (isinstance(new, list) or key in CONCATENATED_KEYS):
        return old + new
    return new


def _join_tool_calls(old: list[Any], new: list[Any]) -> list[Any]:
    calls = {call["index"]: call for call in old}
    for call in new:
        calls[call["index"]] = _join(calls.get(call["index"]), call)
    return list(calls.values())


def differences(expected: Any, actual: Any, path: str = "answer") -> list[str]:
    """Where two answers differ, one line each; empty if they are equal."""
    if isinstance(expected, float) and isinstance(actual, float):
        same = math.isclose(expected, actual, rel_tol=0, abs_tol=LOGPROB_TOLERANCE)
        return [] if same or expected == actual else [f"{path}: {expected} became {actual}"]
    if isinstance(expected, dict) and isinstance(actual, dict):
        keys = [*expected, *(key for key in actual if key not in expected)]
        pairs = [(key, expected.get(key), actual.get(key)) for key in keys]
    elif isinstance(expected, list) and isinstance(actual, list) and len(expected) == len(actual):
        pairs = [(index, expected[index], actual[index]) for index in range(len(expected))]
    elif expected == actual:
        return []
    else:
        return [f"{path}: {expected!r} became {actual!r}"]
    return [line for key, one, other in pairs for line in differences(one, other, f"{path}.{key}")]
