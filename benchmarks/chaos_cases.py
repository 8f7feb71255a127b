"""The requests of the chaos run: mixed features, mixed lengths, and one right answer each.

Owns the table and nothing else. Every case is greedy or seeded, so that whatever happens to the
engines its answer may not change by a token.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.systems import SERVED_NAME

Endpoint = Literal["completions", "chat/completions"]

MAX_MODEL_LEN = 1024
"""The longest request here, prompt and answer together, that the served config must take."""

_EOS_TOKEN_ID = 1
# Ordinary tokens of the demo model.
_PROMPT_TOKEN_IDS = range(4, 768)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One request. `name` is unique; `path` is below the API's base."""

    name: str
    path: Endpoint
    fields: Mapping[str, Any]

    @property
    def streamed(self) -> bool:
        """Whether the answer comes piece by piece."""
        return bool(self.fields.get("stream"))

    @property
    def num_choices(self) -> int:
        """How many answers were asked for."""
        return int(self.fields.get("n", 1))

    def body(self, cache_salt: str | None = None) -> dict[str, Any]:
        """The request's body; a new salt keeps prefix caches from answering it."""
        body = {"model": SERVED_NAME, "temperature": 0, "return_token_ids": True, **self.fields}
        if self.streamed:
            body["stream_options"] = {"include_usage": True}
        return body if cache_salt is None else body | {"cache_salt": cache_salt}


def token_prompt(num_tokens: int) -> list[int]:
    """Random ordinary tokens, others for every length."""
    return random.Random(num_tokens).choices(_PROMPT_TOKEN_IDS, k=num_tokens)


_SAMPLED = {"temperature": 1.0, "seed": 42}
_STREAM = {"stream": True}
_LONG = {"ignore_eos": True, **_STREAM}
_TEXT = "Once upon a time there was a router that"
_MESSAGES = (
    {"role": "system", "content": "You answer at length."},
    {"role": "user", "content": "Where does the river begin, and how long is the journey?"},
)
_ITEMS_SCHEMA = {
    "type": "object",
    "properties": {
        "items": {
            "type": "array",
            "minItems": 12,
            "maxItems": 12,
            "items": {
                "type": "object",
                "properties": {
                    "city": {"enum": ["Rome", "Oslo", "Lima"]},
                    "is_old": {"type": "boolean"},
                },
                "required": ["city", "is_old"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["items"],
    "additionalProperties": False,
}
_TOOL = {
    "type": "function",
    "function": {"name": "visit", "description": "Visits cities.", "parameters": _ITEMS_SCHEMA},
}
_JSON = {"json": _ITEMS_SCHEMA, "disable_any_whitespace": True}

_COMPLETIONS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"prompt": _TEXT, "max_tokens": 300, **_LONG},
    "greedy-whole": {"prompt": token_prompt(150), "max_tokens": 250, "ignore_eos": True},
    "greedy-longest": {"prompt": token_prompt(60), "max_tokens": 900, **_LONG},
    "long-prompt": {"prompt": token_prompt(900), "max_tokens": 60, **_LONG},
    "long-prompt-whole": {"prompt": token_prompt(800), "max_tokens": 20},
    "long-both": {"prompt": token_prompt(500), "max_tokens": 500, **_LONG},
    "one-token": {"prompt": token_prompt(300), "max_tokens": 1, **_STREAM},
    "two-tokens-whole": {"prompt": token_prompt(301), "max_tokens": 2},
    "seed": {"prompt": token_prompt(100), "max_tokens": 500, **_SAMPLED, **_LONG},
    "seed-top-p": {"prompt": token_prompt(101), "max_tokens": 300, "top_p": 0.7, **_SAMPLED}
    | _LONG,
    "seed-top-k-whole": {"prompt": token_prompt(102), "max_tokens": 200, "top_k": 9, **_SAMPLED},
    "penalties": {
        "prompt": token_prompt(120),
        "max_tokens": 400,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.2,
        **_LONG,
    },
    "seed-penalties": {
        "prompt": token_prompt(121),
        "max_tokens": 300,
        "presence_penalty": 1.0,
        "repetition_penalty": 1.3,
        **_SAMPLED,
        **_LONG,
    },
    # Ends at the first token that may be the end: a count that restarts would make it longer.
    "min-tokens": {
        "prompt": token_prompt(80),
        "max_tokens": 600,
        "min_tokens": 350,
        "logit_bias": {str(_EOS_TOKEN_ID): 100.0},
        **_STREAM,
    },
    "logprobs": {"prompt": token_prompt(90), "max_tokens": 300, "logprobs": 3, **_LONG},
    "logprobs-whole": {"prompt": token_prompt(91), "max_tokens": 100, "logprobs": 2},
    "n-2": {"prompt": token_prompt(110), "max_tokens": 250, "n": 2, **_SAMPLED, **_LONG},
    "n-2-whole": {"prompt": token_prompt(111), "max_tokens": 100, "n": 2, **_SAMPLED},
    "json": {"prompt": _TEXT, "max_tokens": 700, "structured_outputs": _JSON, **_STREAM},
    "json-seed": {"prompt": token_prompt(70), "max_tokens": 700, "structured_outputs": _JSON}
    | _SAMPLED
    | _STREAM,
    "choice": {
        "prompt": token_prompt(200),
        "max_tokens": 20,
        "structured_outputs": {"choice": ["prefill", "decode"]},
    },
    "regex": {
        "prompt": token_prompt(201),
        "max_tokens": 600,
        "structured_outputs": {"regex": "([a-d]{3} ){80}end"},
        **_STREAM,
    },
}

_CHAT: Mapping[str, Mapping[str, Any]] = {
    "chat": {"max_tokens": 400, **_LONG},
    "chat-whole": {"max_tokens": 150},
    "chat-seed": {"max_tokens": 300, **_SAMPLED, **_LONG},
    "chat-logprobs": {"max_tokens": 200, "logprobs": True, "top_logprobs": 2, **_LONG},
    "chat-json-whole": {
        "max_tokens": 700,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "items", "schema": _ITEMS_SCHEMA, "strict": True},
        },
    },
    "chat-tool": {
        "max_tokens": 700,
        "tools": [_TOOL],
        "tool_choice": {"type": "function", "function": {"name": "visit"}},
        **_STREAM,
    },
}


def base_cases() -> Iterator[Case]:
    """Every case that can be written down before any answer is known."""
    for name, fields in _COMPLETIONS.items():
        yield Case(name=name, path="completions", fields=fields)
    for name, fields in _CHAT.items():
        yield Case(name=name, path="chat/completions", fields={"messages": _MESSAGES, **fields})


def stop_case(case: Case, text: str) -> Case:
    """`case` with a stop string that ends it late: a piece of `text`, the answer without one.

    Raises:
        ValueError: the answer's second half says nothing new.
    """
    for start in range(len(text) // 2, len(text) - 4):
        stop = text[start : start + 5]
        # Whole characters only: half of one is shown as a replacement that is not in the answer.
        if text.find(stop) == start and stop.isascii() and stop.isprintable():
            return Case(
                name=f"{case.name}-stop", path=case.path, fields={**case.fields, "stop": [stop]}
            )
    raise ValueError(f"no stop string for {case.name}: its answer repeats itself")


UNREAD = Case(
    name="unread",
    path="completions",
    # Megabytes, more than the sockets between engine and client hold.
    fields={
        "prompt": token_prompt(50),
        "max_tokens": 900,
        "n": 2,
        "logprobs": 20,
        **_SAMPLED,
        **_LONG,
    },
)
"""What a client asks for that then does not read it."""


def crowd_cases(num_tokens: int) -> tuple[Case, ...]:
    """What a crowd asks for, each client one of these."""
    return tuple(
        Case(
            name=f"crowd-{number}",
            path="completions",
            fields={"prompt": token_prompt(60 + number), "max_tokens": num_tokens, **_LONG},
        )
        for number in range(8)
    )
