"""Which engine does what of a request: a pure function of the request's features.

The first token comes from prefill wherever continuing from it is exact: decode then starts from
prompt + token with nothing else to know. State that begins with the first output token (a seed's
generator, a grammar, counts of output tokens) cannot be handed to an engine in vLLM 0.32, so such
requests get every token from decode.
"""

import enum
from dataclasses import dataclass

from vllm import SamplingParams


class Route(enum.Enum):
    """The engines a request visits, and who samples its first token."""

    PREFILL_FIRST = "prefill samples the first token, decode the rest"
    DECODE_FIRST = "prefill only fills the KV cache, decode samples every token"
    PREFILL_ONLY = "one token: prefill does it all"
    DECODE_ONLY = "one engine does the whole request"


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffPlan:
    route: Route
    reason: str


def plan_handoff(params: SamplingParams, *, prefills_whole_prompt: bool = True) -> HandoffPlan:
    """How to split a request between the phases.

    Args:
        params: the request's sampling parameters, `max_tokens` already cut to the context limit.
        prefills_whole_prompt: false for models with recurrent state, whose prompt vLLM cuts short
            on the prefill side: what prefill samples there is not the first token.
    """
    if params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None:
        # Needs a forward pass over the whole prompt in the engine that answers.
        return HandoffPlan(route=Route.DECODE_ONLY, reason="prompt_logprobs")
    if not prefills_whole_prompt:
        return HandoffPlan(route=Route.DECODE_FIRST, reason="recurrent_state")
    if params.max_tokens == 1:
        return HandoffPlan(route=Route.PREFILL_ONLY, reason="max_tokens")
    for reason, starts_with_first_token in _output_state(params):
        if starts_with_first_token:
            return HandoffPlan(route=Route.DECODE_FIRST, reason=reason)
    return HandoffPlan(route=Route.PREFILL_FIRST, reason="stateless")


def _output_state(params: SamplingParams) -> tuple[tuple[str, bool], ...]:
    """Features whose state begins with the first output token, and whether they are used."""
    return (
        ("seed", params.seed is not None and params.temperature > 0),
        ("structured_outputs", params.structured_outputs is not None),
        ("presence_penalty", params.presence_penalty != 0),
        ("frequency_penalty", params.frequency_penalty != 0),
        ("min_tokens", params.min_tokens > 0),
        ("thinking_token_budget", params.thinking_token_budget is not None),
        ("repetition_detection", params.repetition_detection is not None),
        ("bad_words", bool(params.bad_words)),
        ("watermarking", bool(params.watermarking)),
        ("trace_decode_token_ids", params.trace_decode_token_ids is not None),
        # What custom logits processors read from extra_args is theirs to know.
        ("extra_args", bool(params.extra_args)),
    )
