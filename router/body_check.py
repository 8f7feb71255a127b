"""What a request's body may not hold, whatever else is in it. Pure.

Bounds what costs more than its bytes: texts that every token is searched for, choices, schemas.
Refuses what JSON can say but nobody behind can hold: a depth beyond any stack, halves of
characters, numbers beyond 64 bits. Looks at the bytes, as reading all of a large body into objects
would cost the loop more than what is looked for. A body that is no JSON is left to the app, which
says so.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

MAX_DEPTH = 100
MAX_TEXTS = 128
"""Stop strings, or bad words, of one request; vLLM takes as many bad words."""
MAX_TEXT_CHARS = 1024
MAX_ID_CHARS = 256
MAX_TEMPLATE_KWARGS = 64
"""vLLM looks at each for milliseconds, in the one thread that renders everybody's prompts."""
MAX_SCHEMA_BYTES = 256 * 1024
INT64 = range(-(2**63), 2**63)

_STRUCTURE = b'"[]{}'
_NOT_STRUCTURE = bytes(set(range(256)) - set(_STRUCTURE))
_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1
_DIGITS_AS_ZERO = bytes(48 if chr(code).isdigit() else 32 for code in range(256))
_LONG = b"0" * 19
_MANY = re.compile(rb"\[\s*[\"\[]")
_WITH_SCHEMAS = ("response_format", "structured_outputs", "tools", "text", "output_config")
_ABSENT = msgspec.Raw(b"null")


@dataclass(frozen=True, slots=True, kw_only=True)
class Excess:
    """What is too much in a request."""

    message: str
    param: str | None = None


class _Asked(msgspec.Struct):
    """The fields that are bounded; what else a body has is skipped, not read."""

    request_id: Any = None
    n: Any = None
    stop: Any = None
    bad_words: Any = None
    prompt: msgspec.Raw = _ABSENT
    messages: msgspec.Raw = _ABSENT
    items: msgspec.Raw = _ABSENT
    sampling_params: msgspec.Raw = _ABSENT
    response_format: msgspec.Raw = _ABSENT
    structured_outputs: msgspec.Raw = _ABSENT
    tools: msgspec.Raw = _ABSENT
    text: msgspec.Raw = _ABSENT
    output_config: msgspec.Raw = _ABSENT
    chat_template_kwargs: msgspec.Raw = _ABSENT


def check_body(body: bytes, *, max_choices: int) -> Excess | None:
    """The first thing that is too much in a body, if any."""
    encoding = json.detect_encoding(body)
    try:
        text = _as_utf8(body, encoding)
    except UnicodeDecodeError:
        # What is no JSON, such as a file in a form, need not be text.
        told = f"The JSON is not valid {encoding.upper()}."
        start = body.decode(encoding, "replace").encode()
        return Excess(message=told) if _may_be_json(start) else None
    if not _may_be_json(text):
        return None
    if _depth_exceeds(text, MAX_DEPTH):
        return Excess(message=f"The JSON is nested deeper than {MAX_DEPTH} levels.")
    if _has_half_characters(text):
        return Excess(message="The JSON has half of a surrogate pair, which is no character.")
    if _has_long_numbers(text):
        return Excess(message="The JSON has a whole number beyond 64 bits.")
    asked = _asked(text)
    return None if asked is None else _check_fields(asked, max_choices)


def _as_utf8(body: bytes, encoding: str) -> bytes:
    """The text that the app reads.

    JSON may come in UTF-16 and UTF-32, and with a mark at its beginning. Python's reader of JSON
    lets halves of characters pass in all of them.

    Raises:
        UnicodeDecodeError: it has halves of characters, or is no text.
    """
    text = body.decode(encoding)
    return body if encoding == "utf-8" else text.encode()


def _may_be_json(text: bytes) -> bool:
    return text.lstrip(b" \t\r\n").startswith((b"{", b"[", b'"'))


def _depth_exceeds(text: bytes, depth: int) -> bool:
    if text.count(b"[") + text.count(b"{") <= depth:
        return False
    # A loop over the brackets would take seconds for a large body.
    unescaped = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = np.frombuffer(unescaped.translate(None, _NOT_STRUCTURE), np.uint8)
    is_outside = np.cumsum(marks == ord('"'), dtype=np.int32) & 1 == 0
    levels = np.cumsum(_STEPS[marks] * is_outside, dtype=np.int32)
    return bool(levels.max() > depth)


def _has_half_characters(text: bytes) -> bool:
    if b"\\ud" not in text and b"\\uD" not in text:
        return False
    try:
        json.dumps(json.loads(text), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    except ValueError:
        return False  # the app says what is wrong
    return False


def _has_long_numbers(text: bytes) -> bool:
    if _LONG not in text.translate(_DIGITS_AS_ZERO):
        return False
    # They may be in a text: look at the numbers.
    longest: list[str] = [""]

    def whole(digits: str) -> int:
        if len(digits) >= len(_LONG):
            longest.append(digits)
        return 0

    try:
        json.loads(text, parse_int=whole)
    except ValueError:
        return False  # the app says what is wrong
    return any(len(each) > 20 or int(each) not in INT64 for each in longest if each)


def _asked(text: bytes) -> _Asked | None:
    try:
        return msgspec.json.decode(text, type=_Asked)
    except msgspec.ValidationError:
        return None  # not an object
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:
        # Python's reader takes more than JSON, such as NaN.
        return msgspec.json.decode(msgspec.json.encode(json.loads(text)), type=_Asked)
    except (ValueError, RecursionError):
        return None


def _check_fields(asked: _Asked, max_choices: int) -> Excess | None:
    if isinstance(asked.request_id, str) and len(asked.request_id) > MAX_ID_CHARS:
        return Excess(
            message=f"request_id is longer than {MAX_ID_CHARS} characters.", param="request_id"
        )
    for name in ("stop", "bad_words"):
        if (excess := check_texts(name, getattr(asked, name))) is not None:
            return excess
    if asked.structured_outputs and bytes(asked.structured_outputs)[:1] not in (b"{", b"n"):
        # vLLM takes it for one without looking.
        told = "structured_outputs is not an object."
        return Excess(message=told, param="structured_outputs")
    for name in _WITH_SCHEMAS:
        if len(bytes(getattr(asked, name))) > MAX_SCHEMA_BYTES:
            return Excess(message=f"{name} is larger than {MAX_SCHEMA_BYTES} bytes.", param=name)
    if _num_fields(asked.chat_template_kwargs) > MAX_TEMPLATE_KWARGS:
        told = f"chat_template_kwargs has more than {MAX_TEMPLATE_KWARGS} entries."
        return Excess(message=told, param="chat_template_kwargs")
    num_prompts = max(map(_num_prompts, (asked.prompt, asked.messages, asked.items)))
    if (num_choices := num_prompts * _whole(asked.n)) > max_choices:
        told = f"{num_choices} choices are asked for, prompts times n; at most {max_choices} may be"
        return Excess(message=f"{told}.", param="n")
    inner = _asked(bytes(asked.sampling_params))
    return None if inner is None else _check_fields(inner, max_choices)


def check_texts(name: str, value: object) -> Excess | None:
    """What is too much in stop strings or bad words: in number, or one in length."""
    texts = value if isinstance(value, list) else [value]
    if len(texts) > MAX_TEXTS:
        return Excess(message=f"{name} has more than {MAX_TEXTS} entries.", param=name)
    if any(isinstance(each, str) and len(each) > MAX_TEXT_CHARS for each in texts):
        told = f"{name} has an entry longer than {MAX_TEXT_CHARS} characters."
        return Excess(message=told, param=name)
    return None


def _num_prompts(raw: msgspec.Raw) -> int:
    """How many a list holds; a list of token ids, or of messages, is one."""
    if _MANY.match(raw) is None:
        return 1
    return len(msgspec.json.decode(raw, type=list[msgspec.Raw]))


def _num_fields(raw: msgspec.Raw) -> int:
    """How many an object has; 0 of what is none."""
    if not bytes(raw).lstrip().startswith(b"{"):
        return 0
    return len(msgspec.json.decode(raw, type=dict[str, msgspec.Raw]))


def _whole(value: object) -> int:
    """What vLLM would take it for; 1 where it takes it for nothing."""
    if not isinstance(value, int | float | str):
        return 1
    try:
        return max(1, int(value))
    except (ValueError, OverflowError):
        pass
    try:
        # A text may have a fraction of zeros.
        return max(1, int(float(value)))
    except (ValueError, OverflowError):
        return 1
