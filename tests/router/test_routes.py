"""The route table of the design, feature by feature."""

from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

from router.routes import Route, plan_route

GRAMMAR = StructuredOutputsParams(choice=["yes", "no"])
REPETITION = RepetitionDetectionParams(max_pattern_size=4, min_pattern_size=1, min_count=3)


@pytest.mark.parametrize(
    ("options", "route"),
    [
        pytest.param({}, Route.PREFILL_FIRST, id="sampled"),
        pytest.param({"temperature": 0}, Route.PREFILL_FIRST, id="greedy"),
        pytest.param({"temperature": 0, "seed": 1}, Route.PREFILL_FIRST, id="greedy-with-seed"),
        pytest.param({"top_k": 5, "top_p": 0.9}, Route.PREFILL_FIRST, id="top-k-p"),
        pytest.param({"logit_bias": {1: 2.0}}, Route.PREFILL_FIRST, id="logit-bias"),
        pytest.param({"logprobs": 3}, Route.PREFILL_FIRST, id="logprobs"),
        pytest.param({"stop": ["x"]}, Route.PREFILL_FIRST, id="stop-string"),
        pytest.param({"repetition_penalty": 1.2}, Route.PREFILL_FIRST, id="repetition-penalty"),
        pytest.param({"seed": 1}, Route.PREFILL_FIRST, id="seed"),
        pytest.param({"structured_outputs": GRAMMAR}, Route.PREFILL_FIRST, id="grammar"),
        pytest.param({"presence_penalty": 0.5}, Route.PREFILL_FIRST, id="presence-penalty"),
        pytest.param({"frequency_penalty": -0.5}, Route.PREFILL_FIRST, id="frequency-penalty"),
        pytest.param({"min_tokens": 2}, Route.PREFILL_FIRST, id="min-tokens"),
        pytest.param({"bad_words": ["no"]}, Route.PREFILL_FIRST, id="bad-words"),
        pytest.param({"thinking_token_budget": 4}, Route.PREFILL_FIRST, id="thinking-budget"),
        pytest.param({"repetition_detection": REPETITION}, Route.DECODE_FIRST, id="repetition"),
        pytest.param({"extra_args": {"custom": 1}}, Route.PREFILL_FIRST, id="custom-processor"),
        pytest.param({"prompt_logprobs": 0}, Route.DECODE_ONLY, id="prompt-logprobs"),
        pytest.param({"prompt_logprobs": 1, "seed": 1}, Route.DECODE_ONLY, id="both"),
        pytest.param({"max_tokens": 1}, Route.PREFILL_ONLY, id="one-token"),
        pytest.param({"max_tokens": 1, "seed": 1}, Route.PREFILL_ONLY, id="one-seeded-token"),
        pytest.param({"max_tokens": 1, "prompt_logprobs": 1}, Route.DECODE_ONLY, id="echo-one"),
    ],
)
def test_route(options: dict[str, Any], route: Route) -> None:
    params = SamplingParams(**{"max_tokens": 16, **options})
    plan = plan_route(params)
    assert plan.route is route
    assert plan.reason


@pytest.mark.parametrize("max_tokens", [1, 16])
def test_a_prompt_that_prefill_cuts_short_gets_every_token_from_decode(max_tokens: int) -> None:
    params = SamplingParams(max_tokens=max_tokens)
    plan = plan_route(params, num_tokens=6, num_dropped_tokens=2)
    assert (plan.route, plan.reason) == (Route.DECODE_FIRST, "prompt_cut_short")


@pytest.mark.parametrize(("num_tokens", "num_dropped"), [(6, 0), (2, 2), (1, 2)])
def test_a_prompt_that_prefill_reads_whole_has_its_first_token_from_there(
    num_tokens: int, num_dropped: int
) -> None:
    params = SamplingParams(max_tokens=16)
    plan = plan_route(params, num_tokens=num_tokens, num_dropped_tokens=num_dropped)
    assert plan.route is Route.PREFILL_FIRST


@pytest.mark.parametrize(
    ("options", "num_output_tokens", "route"),
    [
        pytest.param({}, 5, Route.PREFILL_FIRST, id="mid-answer"),
        pytest.param({}, 15, Route.PREFILL_ONLY, id="last-token"),
        pytest.param({"prompt_logprobs": 1}, 1, Route.PREFILL_FIRST, id="prompt-logprobs-told"),
    ],
)
def test_route_of_what_is_left(
    options: dict[str, Any], num_output_tokens: int, route: Route
) -> None:
    params = SamplingParams(**{"max_tokens": 16, **options})
    assert plan_route(params, num_output_tokens=num_output_tokens).route is route


@pytest.mark.parametrize("max_tokens", [1, 16])
def test_without_prefill_decode_does_it_all(max_tokens: int) -> None:
    plan = plan_route(SamplingParams(max_tokens=max_tokens), has_prefill=False)
    assert plan.route is Route.DECODE_ONLY
