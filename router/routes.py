"""Which engine does what of a request: a pure function of the request's features.

The first token comes from prefill, and decode goes on after it: an engine can be given a request
that has output tokens already (`engine.resume`), so whatever an answer's state is, it continues.
"""

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # The simulator routes with this, and needs no vLLM.
    from vllm import SamplingParams


class Route(enum.Enum):
    """The engines a request visits, and who samples its next token."""

    PREFILL_FIRST = "prefill samples one token, decode the rest"
    DECODE_FIRST = "prefill only fills the KV cache, decode samples every token"
    PREFILL_ONLY = "one token: prefill does it all"
    DECODE_ONLY = "one engine does the whole request"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutePlan:
    route: Route
    reason: str


def plan_route(
    params: "SamplingParams",
    *,
    num_output_tokens: int = 0,
    has_prefill: bool = True,
    num_tokens: int = 0,
    num_dropped_tokens: int = 0,
) -> RoutePlan:
    """How to split a request, or what is left of it, between the phases.

    Args:
        params: the request's sampling parameters, `max_tokens` already cut to the context limit.
        num_output_tokens: how many tokens its client has been given.
        has_prefill: whether a prefill replica is alive.
        num_tokens: of prompt and response so far.
        num_dropped_tokens: at the end of a prompt whose KV is transferred, which prefill leaves to
            decode: what it samples there is not the next token. Of models with recurrent state,
            for one; shorter prompts are prefilled whole.
    """
    if _wants_prompt_logprobs(params) and num_output_tokens == 0:
        # Needs a forward pass over the whole prompt in the engine that answers.
        return RoutePlan(route=Route.DECODE_ONLY, reason="prompt_logprobs")
    if not has_prefill:
        return RoutePlan(route=Route.DECODE_ONLY, reason="no_prefill_replica")
    if 0 < num_dropped_tokens < num_tokens:
        return RoutePlan(route=Route.DECODE_FIRST, reason="prompt_cut_short")
    if params.max_tokens == num_output_tokens + 1:
        return RoutePlan(route=Route.PREFILL_ONLY, reason="max_tokens")
    if params.repetition_detection is not None:
        # vLLM looks for a repetition only where the length does not end the answer first, as it
        # does in prefill.
        return RoutePlan(route=Route.DECODE_FIRST, reason="repetition_detection")
    return RoutePlan(route=Route.PREFILL_FIRST, reason="default")


def _wants_prompt_logprobs(params: "SamplingParams") -> bool:
    return params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None
