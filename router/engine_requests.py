"""What engines are asked of a request: its prefill, or its decode after the tokens so far.

Owns what differs from the client's own request. Changes neither that nor the request's state.
"""

from typing import Any

from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from engine.output_tokens import with_output_tokens
from engine.step_limit import STEP_LIMIT
from router.request import RequestState

KV_PARAMS = "kv_transfer_params"


def prefill_request(state: RequestState, *, samples: bool, transfers_kv: bool) -> EngineCoreRequest:
    """What the prefill engine is asked: all tokens so far, and one more.

    Args:
        samples: the token counts; otherwise it is thrown away and costs as little as it can.
        transfers_kv: decode will pull the KV blocks.
    """
    prompt = state.request.prompt_token_ids
    if samples:
        params = with_output_tokens(state.params, state.output_token_ids)
        params.max_tokens = state.num_output_tokens + 1
        params.min_tokens = min(params.min_tokens, params.max_tokens)
        _drop_prompt_logprobs(state, params)
    else:
        # An end of sequence in the unused token must not keep the blocks from being transferred.
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False)
        params.skip_reading_prefix_cache = state.params.skip_reading_prefix_cache
        if prompt is not None:
            prompt = [*prompt, *state.output_token_ids]
        else:
            # A prompt of embeddings cannot be continued by tokens.
            params = with_output_tokens(params, state.output_token_ids)
            params.max_tokens = state.num_output_tokens + 1
    if transfers_kv:
        remote_decode = {"do_remote_decode": True, "do_remote_prefill": False}
        params.extra_args = {**(params.extra_args or {}), KV_PARAMS: remote_decode}
    return _with(state, params, prompt)


def decode_request(
    state: RequestState,
    kv_transfer_params: dict[str, Any] | None,
    *,
    step_limit_s: float | None = None,
) -> EngineCoreRequest:
    """What the decode engine is asked: to go on after the tokens so far.

    Args:
        kv_transfer_params: of the blocks that prefill keeps for it; None has decode compute them.
        step_limit_s: then, of the steps in which it computes some beside other requests.
    """
    params = with_output_tokens(state.params, state.output_token_ids)
    _drop_prompt_logprobs(state, params)
    if kv_transfer_params is not None:
        params.extra_args = {**(params.extra_args or {}), KV_PARAMS: kv_transfer_params}
    if step_limit_s is not None:
        params.extra_args = {**(params.extra_args or {}), STEP_LIMIT: step_limit_s}
    return _with(state, params, state.request.prompt_token_ids)


def _drop_prompt_logprobs(state: RequestState, params: SamplingParams) -> None:
    if state.output_token_ids:
        # They came with the first token.
        params.prompt_logprobs = params.prompt_logprob_token_ids = None


def _with(
    state: RequestState, params: SamplingParams, prompt: list[int] | None
) -> EngineCoreRequest:
    # A shallow copy by position: the struct's own __copy__ keeps every other field.
    copy: EngineCoreRequest = state.request.__copy__()
    copy.request_id = state.engine_request_id
    copy.sampling_params = params
    copy.prompt_token_ids = prompt
    return copy
