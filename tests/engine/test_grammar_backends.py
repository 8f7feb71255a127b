"""vLLM's structured output manager with a backend for each request, and with answers that stall."""

import time
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_guidance import GuidanceGrammar
from vllm.v1.structured_output.backend_outlines import OutlinesGrammar
from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

from engine import grammar_backends
from engine.arguments import engine_args
from engine.grammar_backends import new_backend, use_one_backend_each
from engine.models import resolve_model


@pytest.fixture(scope="module")
def config() -> VllmConfig:
    return engine_args(resolve_model("demo"), {}).create_engine_config()


@pytest.fixture
def manager(config: VllmConfig) -> Any:
    manager = StructuredOutputManager(config)
    use_one_backend_each(manager)
    return manager


def asking(backend: str, **constraint: Any) -> Request:
    structured = StructuredOutputsParams(**constraint)
    structured._backend = backend
    params = SamplingParams(structured_outputs=structured, max_tokens=8)
    return Request(
        request_id=backend, prompt_token_ids=[5], sampling_params=params, pooling_params=None
    )


def grammar_of(manager: Any, request: Request) -> Any:
    manager.grammar_init(request)
    assert request.structured_output_request is not None
    pending = request.structured_output_request._grammar
    assert isinstance(pending, Future)
    grammar = pending.result()
    assert request.structured_output_request.grammar is grammar
    return grammar


def test_each_request_has_the_backend_that_it_names(manager: Any) -> None:
    """Also after one that no other kind of constraint could be compiled by."""
    asked = (
        (asking("outlines", regex="ab"), OutlinesGrammar),
        (asking("xgrammar", grammar='root ::= "a"'), XgrammarGrammar),
        (asking("guidance", grammar='start: "a"'), GuidanceGrammar),
        (asking("xgrammar", json={"type": "null"}), XgrammarGrammar),
    )
    for request, kind in asked:
        assert type(grammar_of(manager, request)) is kind
    assert len(manager._backends) == 3


def test_their_masks_are_made_together(manager: Any) -> None:
    requests = {name: asking(name, regex="[ab]c") for name in ("outlines", "guidance", "xgrammar")}
    for name, request in requests.items():
        request.request_id = name
        grammar_of(manager, request)
    masks = manager.grammar_bitmask(requests, list(requests), {})
    assert masks.shape == (3, 24)
    letters = {manager.tokenizer.convert_tokens_to_ids(letter) for letter in "ab"}
    for mask in masks:
        bits = torch.from_numpy(mask).view(torch.uint8).numpy()
        allowed = {i for i in range(768) if bits[i // 8] >> (i % 8) & 1}
        assert letters <= allowed
        assert all(manager.tokenizer.decode([i])[0] in "ab" for i in allowed)


def test_an_unknown_backend_is_an_error(config: VllmConfig, manager: Any) -> None:
    with pytest.raises(ValueError, match="no structured output backend is called 'nope'"):
        manager.grammar_init(asking("nope", regex="a"))
    with pytest.raises(ValueError, match="nope"):
        new_backend("nope", config, manager.tokenizer)


class Stalling:
    """A grammar whose masks take as long as it is told."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self.accepted: list[int] = []

    def is_terminated(self) -> bool:
        return False

    def fill_bitmask(self, bitmask: torch.Tensor, index: int) -> None:
        end_s = time.thread_time() + self._step_s
        while time.thread_time() < end_s:
            pass

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        self.accepted += tokens
        return True


@pytest.mark.parametrize(("step_s", "num_accepted"), [(0.0, 4), (0.02, 1)])
def test_an_answer_that_holds_up_the_others_ends(
    manager: Any, monkeypatch: pytest.MonkeyPatch, step_s: float, num_accepted: int
) -> None:
    """With its second slow step: the first mask of a large grammar may take long."""
    monkeypatch.setattr(grammar_backends, "MAX_STEP_S", 0.01 if step_s else 3600.0)
    request, grammar = asking("xgrammar", regex="a*"), Stalling(step_s)
    grammar_of(manager, request)
    assert request.structured_output_request is not None
    request.structured_output_request.grammar = grammar
    results = []
    for token in range(4):
        manager.grammar_bitmask({request.request_id: request}, [request.request_id], {})
        results.append(manager.accept_tokens(request, [token]))
    assert results == [index < num_accepted for index in range(4)]
    assert len(grammar.accepted) == num_accepted


def test_a_request_without_a_constraint_is_left_alone(manager: Any) -> None:
    plain = Request(
        request_id="r",
        prompt_token_ids=[5],
        sampling_params=SamplingParams(max_tokens=8),
        pooling_params=None,
    )
    manager.grammar_init(plain)
    assert manager.accept_tokens(plain, [1])
    assert manager.backend is None
