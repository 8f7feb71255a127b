"""One request's life in the router: its phase, its engines, its times."""

import enum
import time
from dataclasses import dataclass, field

from vllm import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.metrics.stats import PrefillStats

from router.handoff import HandoffPlan
from router.pool import Replica

KV_PARAMS = "kv_transfer_params"


class RequestPhase(enum.Enum):
    """Where a request is. Metrics and spans use these names."""

    RECEIVED = "received"
    PREFILLING = "prefilling"
    TRANSFERRING = "transferring"
    DECODING = "decoding"
    ENDED = "ended"


@dataclass(slots=True)
class RequestState:
    """What the router knows of a running request. Owned by the core client."""

    request: EngineCoreRequest
    plan: HandoffPlan
    phase: RequestPhase = RequestPhase.RECEIVED
    prefill: Replica | None = None
    decode: Replica | None = None
    prefill_stats: PrefillStats | None = None
    """Of the engine that really read the prompt."""
    received_s: float = field(default_factory=time.monotonic)
    phase_since_s: float = 0.0
    last_token_s: float | None = None
    num_output_tokens: int = 0

    @property
    def request_id(self) -> str:
        return str(self.request.request_id)

    @property
    def params(self) -> SamplingParams:
        assert self.request.sampling_params is not None
        return self.request.sampling_params

    @property
    def replica(self) -> Replica | None:
        """The replica that works on it now."""
        return self.prefill if self.phase is RequestPhase.PREFILLING else self.decode


def prefill_request(state: RequestState, *, samples: bool, hands_over: bool) -> EngineCoreRequest:
    """What the prefill engine is asked: the prompt and one token.

    Args:
        samples: the token counts; otherwise it is thrown away and costs as little as it can.
        hands_over: decode will pull the KV blocks.
    """
    if samples:
        params = state.params.clone()
        params.max_tokens = 1
        params.min_tokens = min(params.min_tokens, 1)
    else:
        # An end of sequence in the unused token must not keep the blocks from being handed over.
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)
        params.skip_reading_prefix_cache = state.params.skip_reading_prefix_cache
    if hands_over:
        handover = {"do_remote_decode": True, "do_remote_prefill": False}
        params.extra_args = {**(params.extra_args or {}), KV_PARAMS: handover}
    return _with(state.request, params, state.request.prompt_token_ids)


def decode_request(state: RequestState, output: EngineCoreOutput) -> EngineCoreRequest:
    """What the decode engine is asked: the prompt, prefill's token where it counts, and the rest.

    Args:
        output: prefill's only output, with the blocks it hands over.
    """
    params = state.params.clone()
    prompt = state.request.prompt_token_ids or []
    if state.num_output_tokens:
        assert params.max_tokens is not None
        params.max_tokens -= len(output.new_token_ids)
        prompt = prompt + output.new_token_ids
    params.extra_args = {**(params.extra_args or {}), KV_PARAMS: output.kv_transfer_params}
    return _with(state.request, params, prompt)


def _with(
    request: EngineCoreRequest, params: SamplingParams, prompt: list[int] | None
) -> EngineCoreRequest:
    # A shallow copy by position: the struct's own __copy__ keeps every other field.
    copy: EngineCoreRequest = request.__copy__()
    copy.sampling_params = params
    copy.prompt_token_ids = prompt
    return copy
