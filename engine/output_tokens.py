"""Output tokens that a request brings with it, in `SamplingParams.extra_args`.

What an engine makes of them is in `engine.resume`, which imports half of vLLM; a router needs only
this. Owns the key.
"""

from collections.abc import Sequence

from vllm import SamplingParams

OUTPUT_TOKENS = "pdserve_output_token_ids"
"""The key in `extra_args`. `max_tokens` and `min_tokens` count these tokens too."""


def output_tokens(params: SamplingParams | None) -> list[int]:
    """The output tokens that a request brings with it."""
    if params is None or not params.extra_args:
        return []
    return list(params.extra_args.get(OUTPUT_TOKENS, ()))


def with_output_tokens(params: SamplingParams, tokens: Sequence[int]) -> SamplingParams:
    """A copy of a request's parameters that brings these output tokens."""
    copy: SamplingParams = params.clone()
    if tokens:
        copy.extra_args = {**(copy.extra_args or {}), OUTPUT_TOKENS: list(tokens)}
    return copy
