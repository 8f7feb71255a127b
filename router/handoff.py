"""Which engine does what of a request: a pure function of the request's features.

The first token comes from prefill, and decode goes on after it: an engine can be given a request
that has output tokens already (`engine.resume`), so whatever an answer's state is, it continues.
"""

import enum
from dataclasses import dataclass

from vllm import SamplingParams


class Route(enum.Enum):
    """The engines a request visits, and who samples its next token."""

    PREFILL_FIRST = "prefill samples one token, decode the rest"
    DECODE_FIRST = "prefill only fills the KV cache, decode samples every token"
    PREFILL_ONLY = "one token: prefill does it all"
    DECODE_ONLY = "one engine does the whole request"


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffPlan:
    route: Route
    reason: str


def plan_handoff(
    params: SamplingParams,
    *,
    num_output_tokens: int = 0,
    has_prefill: bool = True,
    prefills_whole_prompt: bool = True,
) -> HandoffPlan:
    """How to split a request, or what is left of it, between the phases.

    Args:
        params: the request's sampling parameters, `max_tokens` already cut to the context limit.
        num_output_tokens: how many tokens its client has been given.
        has_prefill: whether a prefill replica is alive.
        prefills_whole_prompt: false for models with recurrent state, whose prompt vLLM cuts short
            on the prefill side: what prefill samples there is not the next token.
    """
    if _wants_prompt_logprobs(params) and num_output_tokens == 0:
        # Needs a forward pass over the whole prompt in the engine that answers.
        return HandoffPlan(route=Route.DECODE_ONLY, reason="prompt_logprobs")
    if not has_prefill:
        return HandoffPlan(route=Route.DECODE_ONLY, reason="no_prefill_replica")
    if not prefills_whole_prompt:
        return HandoffPlan(route=Route.DECODE_FIRST, reason="recurrent_state")
    if params.max_tokens == num_output_tokens + 1:
        return HandoffPlan(route=Route.PREFILL_ONLY, reason="max_tokens")
    if params.repetition_detection is not None:
        # vLLM looks for a repetition only where the length does not end the answer first, as it
        # does in prefill.
        return HandoffPlan(route=Route.DECODE_FIRST, reason="repetition_detection")
    return HandoffPlan(route=Route.PREFILL_FIRST, reason="default")


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPrefill:
    """What is predicted if decode reads the prompt itself, in one step with its other requests."""

    wait_s: float
    """Until that step begins: at most the step before it."""
    step_s: float
    """That step: the uncached part of this prompt and of those that came just before, and a token
    for each of the others."""
    has_room: bool
    """Nothing waits there for KV blocks or a place in the batch."""
    is_cached: bool
    """Some of the prompt is cached there."""

    @property
    def finish_s(self) -> float:
        """Until the first token."""
        return self.wait_s + self.step_s


def plan_local_prefill(
    local: LocalPrefill, *, prefill_s: float, handover_s: float, itl_s: float
) -> HandoffPlan | None:
    """Whether decode reads a prompt itself; None has it go to prefill.

    It does where its second token is then predicted to come sooner, which spares it the handover,
    and where no request that decode serves waits longer for a token than its target allows.

    Args:
        prefill_s: until a prefill replica is predicted to be done with it.
        handover_s: from there to decode's first token, as measured lately.
        itl_s: the target.
    """
    if not local.has_room or local.step_s > itl_s:
        return None
    if local.finish_s >= prefill_s + handover_s:
        return None
    reason = "cached_in_decode" if local.is_cached else "short_prompt"
    return HandoffPlan(route=Route.DECODE_ONLY, reason=reason)


def _wants_prompt_logprobs(params: SamplingParams) -> bool:
    return params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None
