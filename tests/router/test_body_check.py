"""What a request's body may not hold."""

import json
import sys
from typing import Any

import pytest

from router.body_check import MAX_DEPTH, MAX_SCHEMA_BYTES, check_body


def nested(depth: int) -> Any:
    value: Any = 1
    for level in range(depth):
        value = [value] if level % 2 else {"a": value}
    return value


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "demo", "prompt": "Once"} | fields).encode()


INNOCENT = {
    "no-fields": b"{}",
    "no-object": b"[1, 2]",
    "no-json": b'{"model": ',
    "no-json-at-all": b"hello" * 100,
    "nothing": b"",
    "no-text-at-all": b"--form\r\n\r\n\xff\xfe\xed\xa0\x80",
    "characters-of-each-length": '{"model": "é日\U0001f600"}'.encode(),
    "depth": json.dumps(nested(MAX_DEPTH)).encode(),
    "many-brackets": body(messages=[{"role": "user", "content": "[{"}] * 500),
    "brackets-in-a-text": body(prompt='"[{\\"' * 500),
    "quotes-in-a-text": body(prompt='\\\\"\\"' * 500, x=nested(90)),
    "unclosed": b"[" * MAX_DEPTH,
    "character-beyond-16-bits": body(prompt="\U0001f600"),
    "escaped-backslash": b'{"prompt": "\\\\ud800"}',
    "ends-of-64-bits": body(seed=2**63 - 1, priority=-(2**63)),
    "long-number-in-a-text": body(prompt="1" * 30),
    "fraction": body(temperature=0.12345678901234567890123),
    "as-many-choices": body(prompt=["a"] * 256, n=4),
    "one-prompt-of-tokens": body(prompt=[5] * 5000),
    "one-chat": body(messages=[{"role": "user", "content": "a"}] * 2000),
    "stop": body(stop=["a" * 1024] * 128, bad_words=None),
    "of-another-type": body(n="many", stop=5, request_id=[1], sampling_params="x"),
    "not-a-number": b'{"temperature": NaN, "n": 2}',
    "utf-16": json.dumps({"n": 2}).encode("utf-16"),
    "structures": body(structured_outputs={"regex": "a"}, response_format=None),
    "no-structure": body(structured_outputs=None),
}


@pytest.mark.parametrize("text", INNOCENT.values(), ids=INNOCENT)
def test_what_others_take_or_refuse_is_left_to_them(text: bytes) -> None:
    assert check_body(text, max_choices=1024) is None


EXCESSIVE = {
    "depth": (json.dumps(nested(MAX_DEPTH + 1)).encode(), None),
    "depth-beyond-any-stack": (b'{"a":' * 500_000 + b"1" + b"}" * 500_000, None),
    "depth-unclosed": (b"[" * 1_000_000, None),
    "depth-beside-quotes": (body(prompt='\\"' * 99, x=nested(MAX_DEPTH)), None),
    "half-a-character": (b'{"prompt": "a\\udfff"}', None),
    "half-a-character-in-a-key": (b'{"vllm_xargs": {"\\uD800": 1}}', None),
    "halves-in-the-wrong-order": (b'{"stop": ["\\udc00\\ud800"]}', None),
    "half-a-character-as-bytes": (b'{"bad_words": ["\xed\xa0\x80"]}', None),
    "half-a-character-in-utf-16": ('{"a": "\ud800"}'.encode("utf-16", "surrogatepass"), None),
    "half-a-character-in-utf-32": ('{"a": "\ud800"}'.encode("utf-32-le", "surrogatepass"), None),
    "half-a-character-escaped-in-utf-16": ('{"a": "\\ud800"}'.encode("utf-16"), None),
    "half-a-character-alone": (b'"\\ud800"', None),
    "half-a-character-as-bytes-alone": (b' "\xed\xa0\x80"', None),
    "not-utf-8": (b'{"model": "\xff"}', None),
    "cut-within-a-character": ('{"model": "é'.encode()[:-1], None),
    "half-of-utf-16": (json.dumps({"n": 2}).encode("utf-16")[:-1], None),
    "beyond-64-bits": (body(priority=2**63), None),
    "below-64-bits": (body(vllm_xargs={"x": [-(2**63) - 1]}), None),
    "far-beyond": (body(seed=10**400), None),
    "request-id": (body(request_id="x" * 257), "request_id"),
    "stop-strings": (body(stop=["a"] * 129), "stop"),
    "a-long-stop-string": (body(stop="a" * 1025), "stop"),
    "bad-words": (body(bad_words=["a"] * 129), "bad_words"),
    "schema": (body(response_format={"x": "y" * MAX_SCHEMA_BYTES}), "response_format"),
    "anthropic-schema": (
        body(output_config={"format": {"schema": {"x": "y" * MAX_SCHEMA_BYTES}}}),
        "output_config",
    ),
    "structure-of-another-type": (body(structured_outputs=["a"]), "structured_outputs"),
    "tools": (body(tools=["y" * MAX_SCHEMA_BYTES]), "tools"),
    "n": (body(n=1025), "n"),
    "n-as-a-text": (body(n="1025"), "n"),
    "template-kwargs": (
        body(chat_template_kwargs={str(number): 1 for number in range(65)}),
        "chat_template_kwargs",
    ),
    "n-as-a-text-with-a-fraction": (body(n=" 1025.0 "), "n"),
    "prompts": (body(prompt=["a"] * 1025), "n"),
    "prompts-of-tokens": (body(prompt=[[5]] * 513, n=2), "n"),
    "chats": (body(messages=[[{"role": "user"}]] * 1025), "n"),
    "of-sampling-params": (body(sampling_params={"n": 1025}), "n"),
    "not-a-number-beside": (b'{"temperature": NaN, "n": 5000}', "n"),
    "twice": (b'{"n": 1, "n": 5000}', "n"),
    "utf-16": (json.dumps({"n": 5000}).encode("utf-16"), "n"),
    "utf-8-with-a-mark": (json.dumps({"n": 5000}).encode("utf-8-sig"), "n"),
}


@pytest.mark.parametrize(("text", "param"), EXCESSIVE.values(), ids=EXCESSIVE)
def test_what_is_too_much_is_named(text: bytes, param: str | None) -> None:
    excess = check_body(text, max_choices=1024)
    assert excess is not None
    assert excess.param == param
    assert len(excess.message) < 200


def test_what_is_left_does_not_end_pythons_own_reader() -> None:
    deep = json.loads(json.dumps(nested(MAX_DEPTH)))
    assert sys.getrecursionlimit() > 3 * MAX_DEPTH
    assert json.loads(json.dumps(deep)) == deep
