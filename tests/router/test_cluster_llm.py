"""vLLM's front end over the cluster: what becomes of constraints before an engine is asked."""

import contextlib
from http import HTTPStatus
from typing import Any

import pytest
from core_clusters import Cluster
from vllm import SamplingParams
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.structured_output import backend_xgrammar

from engine.arguments import engine_args
from engine.models import resolve_model
from router.cluster_llm import ClusterLLM
from router.core import RouterCore
from router.core_client import ClusterCoreClient
from router.errors import SandboxUnavailable
from router.loop_validation import MAX_LARK_LENGTH, validate_without_compiling
from router.route_note import NOTE, RouteNote

WRONG = "(("
"""No compiler takes it: where it passes, none has been asked."""


class Checks:
    """Takes or refuses all that it is asked for."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked: list[StructuredOutputsParams] = []
        self._error = error

    async def apply(self, constraint: StructuredOutputsParams) -> None:
        self.asked.append(constraint)
        if self._error is not None:
            raise self._error
        constraint._backend = "xgrammar"


def front_end(core: RouterCore, checks: Checks, **options: Any) -> ClusterLLM:
    config = engine_args(resolve_model("demo"), options).create_engine_config()
    grammars: Any = checks
    return ClusterLLM(
        config,
        ClusterCoreClient(core),
        client_priority=(-10, 10),
        max_prompt_logprobs=12,
        grammars=grammars,
    )


async def ask(llm: ClusterLLM, request_id: str = "r", **params: Any) -> Any:
    prompt = {"type": "token", "prompt_token_ids": [5, 6, 7]}
    return await llm.add_request(request_id, prompt, SamplingParams(max_tokens=4, **params))


def regex(text: str) -> dict[str, Any]:
    return {"structured_outputs": StructuredOutputsParams(regex=text)}


async def test_what_the_check_passes_is_not_compiled_again() -> None:
    cluster, checks = Cluster(), Checks()
    llm = front_end(cluster.core, checks)
    await ask(llm, **regex(WRONG))
    (state,) = cluster.core.lifecycle.requests.values()
    assert state.request.sampling_params is not None
    assert state.request.sampling_params.structured_outputs.regex == WRONG
    assert state.request.sampling_params.structured_outputs._backend == "xgrammar"
    llm.shutdown()


async def test_without_a_constraint_nothing_is_asked() -> None:
    cluster, checks = Cluster(), Checks()
    llm = front_end(cluster.core, checks)
    await ask(llm)
    assert checks.asked == []
    llm.shutdown()


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (VLLMValidationError("no"), VLLMValidationError),
        (SandboxUnavailable(), GracefulHTTPError),
    ],
)
async def test_what_it_refuses_leaves_nothing(error: Exception, raised: type[Exception]) -> None:
    cluster = Cluster()
    llm = front_end(cluster.core, Checks(error))
    with pytest.raises(raised) as caught:
        await ask(llm, **regex("a"))
    if isinstance(caught.value, GracefulHTTPError):
        assert caught.value.http_status == HTTPStatus.SERVICE_UNAVAILABLE
    assert not llm.output_processor.has_unfinished_requests()
    cluster.check_complete()
    llm.shutdown()


BAD_WORDS = [f"{number}" + "a" * 1023 for number in range(8)]


@pytest.mark.parametrize(
    ("params", "told"),
    [
        pytest.param({"bad_words": ["abcd"] * 2}, None, id="short"),
        pytest.param({"bad_words": BAD_WORDS}, None, id="at-the-limit"),
        pytest.param({"bad_words": [*BAD_WORDS, "b"]}, "8192 characters", id="over"),
        pytest.param({"bad_words": ["a" * 1025]}, "longer than 1024", id="one-long"),
        pytest.param({"stop": ["a" * 1024] * 128}, None, id="stop-at-the-limit"),
        pytest.param({"stop": "a" * 1025}, "longer than 1024", id="stop-long"),
        pytest.param({"stop": ["a"] * 129}, "more than 128", id="stop-many"),
    ],
)
async def test_texts_have_a_length_in_every_protocol(
    params: dict[str, Any], told: str | None
) -> None:
    cluster = Cluster()
    llm = front_end(cluster.core, Checks())
    note = RouteNote()
    NOTE.set(note)
    refusal = pytest.raises(VLLMValidationError, match=told) if told else contextlib.nullcontext()
    with refusal as caught:
        await ask(llm, **params)
    if isinstance(caught, pytest.ExceptionInfo):
        assert caught.value.parameter in params
        assert note.error is caught.value
    assert len(cluster.core.lifecycle.requests) == (0 if told else 1)
    llm.shutdown()


LARK = 'start: "' + "a" * MAX_LARK_LENGTH + '"'


@pytest.mark.parametrize(
    ("constraint", "passes"),
    [
        pytest.param({"regex": WRONG}, True, id="regex"),
        pytest.param({"json": {"type": "string", "pattern": WRONG}}, True, id="schema"),
        pytest.param({"json": {"type": "integer", "multipleOf": 2}}, False, id="unsupported"),
        pytest.param({"json": "{"}, False, id="no-json"),
        pytest.param({"structural_tag": '{"any": "tag"}'}, True, id="tag"),
        pytest.param({"structural_tag": "{"}, False, id="no-tag"),
        pytest.param({"grammar": 'start: "a"'}, True, id="lark"),
        pytest.param({"grammar": LARK}, False, id="long-lark"),
        pytest.param({"grammar": LARK.replace("start:", "root ::=")}, True, id="long-ebnf"),
    ],
)
def test_in_the_loop_nothing_is_compiled(constraint: dict[str, Any], passes: bool) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**constraint))
    if passes:
        validate_without_compiling(params)
        return
    with pytest.raises((TypeError, ValueError, VLLMValidationError)):
        validate_without_compiling(params)


def test_vllm_calls_what_stands_for_its_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it parses a body with a structural tag."""
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    tag = {"type": "json_schema", "json_schema": {"type": "string", "pattern": WRONG}}
    body = {"prompt": "a", "response_format": {"type": "structural_tag", "format": tag}}
    with pytest.raises(VLLMValidationError, match="structural_tag"):
        CompletionRequest.model_validate(body)
    monkeypatch.setattr(backend_xgrammar, "validate_xgrammar_grammar", validate_without_compiling)
    CompletionRequest.model_validate(body)


@pytest.mark.parametrize(
    ("asked", "taken"),
    [(0, 0), (-10, -10), (7, 7), (11, 10), (10**30, 10), (-(2**63), -10)],
)
async def test_what_a_client_does_not_decide(
    monkeypatch: pytest.MonkeyPatch, asked: int, taken: int
) -> None:
    async def add_request(self: AsyncLLM, *args: Any, **options: Any) -> tuple[Any, Any]:
        return args, options

    llm: Any = front_end(Cluster().core, Checks())
    monkeypatch.setattr(AsyncLLM, "add_request", add_request)
    params = SamplingParams(extra_args={"kv_transfer_params": "x", "other": 1})
    added = await llm.add_request("r", "a", params, priority=asked, session_id="s")
    assert added == (("r", "a", params), {"priority": taken, "session_id": "s"})
    assert params.extra_args == {"other": 1}
    llm.shutdown()


@pytest.mark.parametrize(
    ("params", "is_taken"),
    [
        pytest.param({"prompt_logprobs": 3}, True, id="at-the-limit"),
        pytest.param({"prompt_logprobs": 4}, False, id="over"),
        pytest.param({"prompt_logprobs": 1, "n": 3, "temperature": 1}, False, id="of-choices"),
        pytest.param({"prompt_logprobs": -1}, False, id="of-the-vocabulary"),
        pytest.param({"logprobs": 20}, True, id="of-the-answer"),
    ],
)
async def test_prompt_logprobs_have_a_bound(params: dict[str, Any], is_taken: bool) -> None:
    cluster = Cluster()
    llm = front_end(cluster.core, Checks(), max_logprobs=-1)
    if is_taken:
        await ask(llm, **params)
    else:
        with pytest.raises(VLLMValidationError, match="More than 12 log probabilities"):
            await ask(llm, **params)
        assert not llm.output_processor.has_unfinished_requests()
        cluster.check_complete()
    llm.shutdown()


async def test_what_vllm_refuses_it_names_itself() -> None:
    cluster = Cluster()
    llm = front_end(cluster.core, Checks())
    with pytest.raises(VLLMValidationError, match="greater than max allowed: 20"):
        await ask(llm, prompt_logprobs=21)
    llm.shutdown()


async def test_all_prompts_of_one_request_have_one_bound() -> None:
    cluster = Cluster()
    llm = front_end(cluster.core, Checks())
    token = NOTE.set(RouteNote())
    try:
        await ask(llm, prompt_logprobs=1)
        await ask(llm, prompt_logprobs=1, request_id="s")
        with pytest.raises(VLLMValidationError, match="More than 12 log probabilities"):
            await ask(llm, prompt_logprobs=0, request_id="t")
    finally:
        NOTE.reset(token)
    llm.shutdown()
