"""The requests whose answers must be the same from the cluster and from one plain vLLM server.

Owns the table and nothing else: every case is sent as it stands, streamed and not.
"""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from answers import CHAT, COMPLETIONS
from servers import MAX_MODEL_LEN, MODEL

EOS_TOKEN_ID = 1
NUM_SPECIAL_TOKENS = 4
VOCAB_SIZE = 768

PROMPT = "Once upon a time there was a router that"
MESSAGES = (
    {"role": "system", "content": "You answer in one sentence."},
    {"role": "user", "content": "Where does the river begin?"},
)
CITY_SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "is_old": {"type": "boolean"}},
    "required": ["city", "is_old"],
    "additionalProperties": False,
}
CITY_TOOL = {
    "type": "function",
    "function": {"name": "visit", "description": "Visits a city.", "parameters": CITY_SCHEMA},
}
NAMED_TOOL = {"type": "function", "function": {"name": "visit"}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One request. `name` is unique among the cases of its endpoint."""

    name: str
    endpoint: str
    fields: Mapping[str, Any]
    can_stream: bool = True

    def __str__(self) -> str:
        return f"{self.endpoint.removeprefix('/v1/').replace('/', '-')}-{self.name}"

    def body(self, *, stream: bool = False) -> dict[str, Any]:
        """Greedy and with the token ids in the answer, unless the case says otherwise."""
        body = {"model": MODEL, "temperature": 0, "return_token_ids": True, **self.fields}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body


def token_prompt(num_tokens: int, seed: int = 0) -> list[int]:
    """Ordinary tokens, others for every length and seed."""
    chosen = random.Random(f"{num_tokens} {seed}")
    return chosen.choices(range(NUM_SPECIAL_TOKENS, VOCAB_SIZE), k=num_tokens)


def cases() -> Iterator[Case]:
    """Every case."""
    for name, fields in COMPLETION_FIELDS.items():
        base = {"prompt": PROMPT, "max_tokens": 12}
        yield Case(
            name=name,
            endpoint=COMPLETIONS,
            fields=base | fields,
            can_stream=name not in NOT_STREAMED,
        )
    for name, fields in CHAT_FIELDS.items():
        base = {"messages": MESSAGES, "max_tokens": 12}
        yield Case(
            name=name, endpoint=CHAT, fields=base | fields, can_stream=name not in NOT_STREAMED
        )


SAMPLED = {"temperature": 1.0, "seed": 42}

SHARED_FIELDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "one-token": {"max_tokens": 1},
    "two-tokens": {"max_tokens": 2},
    "long": {"max_tokens": 200},
    "n-2": {"n": 2, "temperature": 1.0, "seed": 7},
    "n-3-one-token": {"n": 3, "temperature": 1.0, "seed": 7, "max_tokens": 1},
    "seed": SAMPLED,
    "seed-one-token": SAMPLED | {"max_tokens": 1},
    "seed-top-p": SAMPLED | {"top_p": 0.5},
    "seed-top-k": SAMPLED | {"top_k": 5},
    "seed-min-p": SAMPLED | {"min_p": 0.2},
    "seed-penalties": SAMPLED | {"presence_penalty": 1.0, "repetition_penalty": 1.3},
    "seed-greedy": {"seed": 42},
    "top-k-1": {"temperature": 1.0, "top_k": 1},
    "presence-penalty": {"presence_penalty": 2.0, "max_tokens": 40},
    "frequency-penalty": {"frequency_penalty": 2.0, "max_tokens": 40},
    "repetition-penalty": {"repetition_penalty": 2.0, "max_tokens": 40},
    "repetition-penalty-below-1": {"repetition_penalty": 0.5},
    "all-penalties": {
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.2,
        "max_tokens": 40,
    },
    "logit-bias": {"logit_bias": {"100": 3.0, "200": -100.0, "300": 5.0}, "max_tokens": 20},
    "eos-first": {"logit_bias": {str(EOS_TOKEN_ID): 100.0}},
    "eos-first-kept": {
        "logit_bias": {str(EOS_TOKEN_ID): 100.0},
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
    },
    "eos-ignored": {"logit_bias": {str(EOS_TOKEN_ID): 100.0}, "ignore_eos": True},
    "eos-after-min-tokens": {"logit_bias": {str(EOS_TOKEN_ID): 100.0}, "min_tokens": 5},
    "eos-after-min-tokens-1": {"logit_bias": {str(EOS_TOKEN_ID): 100.0}, "min_tokens": 1},
    "min-tokens-all": {"min_tokens": 12},
    "special-tokens-kept": {"logit_bias": {"2": 100.0}, "skip_special_tokens": False},
    "special-tokens-skipped": {"logit_bias": {"2": 100.0}},
    "allowed-tokens": {"allowed_token_ids": [50, 60, 70, 80]},
    "allowed-token": {"allowed_token_ids": [50], "max_tokens": 5},
    "choice": {"structured_outputs": {"choice": ["prefill", "decode"]}},
    "regex": {"structured_outputs": {"regex": "(ab|cd){2,4}[0-9]"}, "max_tokens": 30},
    "grammar": {"structured_outputs": {"grammar": 'root ::= "yes" | "no" root'}},
    "json": {
        "structured_outputs": {"json": CITY_SCHEMA, "disable_any_whitespace": True},
        "max_tokens": 60,
    },
    "json-cut-off": {"structured_outputs": {"json": CITY_SCHEMA}, "max_tokens": 3},
    "json-one-token": {"structured_outputs": {"json": CITY_SCHEMA}, "max_tokens": 1},
    "json-object": {"response_format": {"type": "json_object"}, "max_tokens": 30},
    "json-schema": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "city", "schema": CITY_SCHEMA, "strict": True},
        },
        "max_tokens": 60,
    },
    "json-sampled": SAMPLED | {"structured_outputs": {"json": CITY_SCHEMA}, "max_tokens": 60},
    "repetition-detected": {
        "logit_bias": {"100": 100.0},
        "repetition_detection": {"max_pattern_size": 4, "min_pattern_size": 1, "min_count": 4},
    },
    "stream-interval": {"stream_interval": 5},
    "prompt-logprobs": {"prompt_logprobs": 3},
    "cache-salt": {"cache_salt": "one client's own"},
}

COMPLETION_FIELDS: dict[str, dict[str, Any]] = SHARED_FIELDS | {
    "token-prompt": {"prompt": token_prompt(20)},
    "several-prompts": {"prompt": [PROMPT, "What is", "def add("], "max_tokens": 8},
    "several-token-prompts": {"prompt": [token_prompt(40), token_prompt(33)]},
    "several-prompts-n-2": {"prompt": [PROMPT, "What is"], "n": 2} | SAMPLED,
    "logprobs": {"logprobs": 5},
    "logprobs-0": {"logprobs": 0},
    "logprobs-one-token": {"logprobs": 2, "max_tokens": 1},
    "logprobs-n-2": {"logprobs": 2, "n": 2} | SAMPLED,
    "logprobs-of-tokens": {"logprobs": 1, "logprob_token_ids": [10, 20]},
    "logprobs-as-ids": {"logprobs": 2, "return_tokens_as_token_ids": True},
    "logprobs-penalty": {"logprobs": 2, "presence_penalty": 1.5},
    "bad-words": {"bad_words": ["e", "the"]},
    "echo": {"echo": True},
    "echo-only": {"echo": True, "max_tokens": 0},
    "echo-logprobs": {"echo": True, "logprobs": 2},
    "echo-only-logprobs": {"echo": True, "logprobs": 2, "max_tokens": 0},
    "echo-one-token": {"echo": True, "max_tokens": 1},
    "echo-logprobs-one-token": {"echo": True, "logprobs": 2, "max_tokens": 1},
    "echo-several": {"echo": True, "logprobs": 1, "prompt": [PROMPT, "What is"]},
    "prompt-logprobs-one-token": {"prompt_logprobs": 1, "max_tokens": 1},
    "prompt-logprobs-long": {"prompt_logprobs": 1, "prompt": token_prompt(300)},
    "no-special-tokens": {"add_special_tokens": False},
    "truncated-prompt": {"prompt": token_prompt(100), "truncate_prompt_tokens": 40},
    "beam-search": {"use_beam_search": True, "n": 2},
    "up-to-the-limit": {"prompt": token_prompt(400), "max_tokens": MAX_MODEL_LEN - 400},
}

CHAT_FIELDS: dict[str, dict[str, Any]] = SHARED_FIELDS | {
    "logprobs": {"logprobs": True, "top_logprobs": 5},
    "logprobs-chosen-only": {"logprobs": True},
    "logprobs-one-token": {"logprobs": True, "top_logprobs": 2, "max_tokens": 1},
    "logprobs-n-2": {"logprobs": True, "top_logprobs": 2, "n": 2} | SAMPLED,
    "bad-words": {"bad_words": ["e", "the"]},
    "echo": {"echo": True},
    "max-completion-tokens": {"max_tokens": None, "max_completion_tokens": 6},
    "no-limit": {
        "messages": [{"role": "user", "content": "What is this? " * 80}],
        "max_tokens": None,
        "ignore_eos": True,
    },
    "named-tool": {"tools": [CITY_TOOL], "tool_choice": NAMED_TOOL, "max_tokens": 60},
    "required-tool": {"tools": [CITY_TOOL], "tool_choice": "required", "max_tokens": 80},
    "auto-tool": {"tools": [CITY_TOOL], "tool_choice": "auto"},
    "no-tool": {"tools": [CITY_TOOL], "tool_choice": "none"},
    "no-generation-prompt": {"add_generation_prompt": False},
    "content-parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "What is this?"}]}]
    },
}

NOT_STREAMED = {
    *("prompt-logprobs", "prompt-logprobs-one-token", "prompt-logprobs-long"),
    *("beam-search", "echo-only", "echo-only-logprobs"),
}
"""vLLM refuses to stream these."""
