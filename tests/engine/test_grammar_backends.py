"""vLLM's structured output manager with a backend for each request, and with answers that stall."""

from concurrent.futures import Future
from typing import Any

import pytest
import torch
import xgrammar
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_guidance import GuidanceGrammar
from vllm.v1.structured_output.backend_outlines import OutlinesGrammar
from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

from engine.arguments import engine_args
from engine.grammar_backends import new_backend, use_one_backend_each
from engine.grammar_budget import BudgetedGrammar
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
    assert isinstance(grammar, BudgetedGrammar)
    return grammar._grammar


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
        new_backend("nope", config, manager.tokenizer, num_threads=1)


def test_xgrammar_compiles_with_as_many_threads_as_it_is_told(
    config: VllmConfig, manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []
    make = xgrammar.GrammarCompiler

    def recording(*args: Any, **options: Any) -> Any:
        given.append(options)
        return make(*args, **options)

    monkeypatch.setattr(xgrammar, "GrammarCompiler", recording)
    new_backend("xgrammar", config, manager.tokenizer, num_threads=3)
    (options,) = given
    assert options["max_threads"] == 3
    assert xgrammar.GrammarCompiler is recording


class Clocked(XgrammarGrammar):  # type: ignore[misc]
    """A real grammar, whose calls of one kind take seconds by a clock of its own."""

    def __init__(self, real: XgrammarGrammar, slow: str, call_s: float) -> None:
        super().__init__(real.vocab_size, real.matcher, real.ctx)
        self._slow, self._call_s = slow, call_s
        self.now_s = 0.0
        self.num_accepted = 0

    def fill_bitmask(self, bitmask: torch.Tensor, batch_index: int) -> None:
        self._take("fill_bitmask")
        super().fill_bitmask(bitmask, batch_index)

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        self._take("accept_tokens")
        self.num_accepted += len(tokens)
        return bool(super().accept_tokens(request_id, tokens))

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        self._take("validate_tokens")
        return list(super().validate_tokens(tokens))

    def _take(self, call: str) -> None:
        self.now_s += self._call_s * (self._slow in (call, "all"))


def clocked(manager: Any, slow: str, call_s: float) -> tuple[Request, Clocked]:
    request = asking("xgrammar", regex="a*")
    grammar = Clocked(grammar_of(manager, request), slow, call_s)
    assert request.structured_output_request is not None
    request.structured_output_request.grammar = BudgetedGrammar(grammar, lambda: grammar.now_s)
    return request, grammar


@pytest.mark.parametrize(
    ("slow", "call_s", "ends_with"),
    [
        ("fill_bitmask", 0.3, 1),
        ("accept_tokens", 0.3, 1),
        ("validate_tokens", 0.3, 1),
        ("all", 0.1, 1),  # three calls in each step
        ("all", 0.08, None),
        ("accept_tokens", 0.2, None),
    ],
)
def test_an_answer_that_holds_up_the_others_ends(
    manager: Any, slow: str, call_s: float, ends_with: int | None
) -> None:
    """With its second slow step, whatever was slow: the first mask may take long."""
    request, _ = clocked(manager, slow, call_s)
    token = manager.tokenizer.convert_tokens_to_ids("a")
    results = []
    for _ in range(4):
        manager.validate_tokens(request, [token])
        manager.grammar_bitmask({request.request_id: request}, [request.request_id], {})
        results.append(manager.accept_tokens(request, [token]))
    assert results == [ends_with is None or index < ends_with for index in range(4)]


def test_a_slow_draft_counts_too(manager: Any) -> None:
    request, grammar = clocked(manager, "accept_tokens", 0.1)
    token = manager.tokenizer.convert_tokens_to_ids("a")
    budgeted = request.structured_output_request
    assert budgeted is not None
    assert isinstance(budgeted.grammar, BudgetedGrammar)
    assert not all(budgeted.grammar.accept_tokens("draft", [token]) for _ in range(9))
    assert grammar.num_accepted == 6
    assert not manager.accept_tokens(request, [token])
    assert manager.validate_tokens(request, [token]) == []
    assert grammar.num_accepted == 6


@pytest.mark.parametrize(("call_s", "num_accepted"), [(0.1, 6), (0.00001, 1000)])
def test_an_answer_that_goes_on_here_holds_up_one_step_no_longer_than_two_slow_ones(
    manager: Any, call_s: float, num_accepted: int
) -> None:
    request, grammar = clocked(manager, "accept_tokens", call_s)
    token = manager.tokenizer.convert_tokens_to_ids("a")
    assert manager.accept_tokens(request, [token] * 1000) == (num_accepted == 1000)
    assert grammar.num_accepted == num_accepted


def test_an_ambiguous_grammar_ends_its_answer(manager: Any) -> None:
    """Its masks are cheap. Its accepted tokens take longer each, all of these many minutes."""
    rules = "\n".join(
        f's{i} ::= "Q" s{(i * 7 + 1) % 60} s{(i * 11 + 3) % 60} | "Q"' for i in range(60)
    )
    starts = " | ".join(f"s{i}" for i in range(60))
    request = asking("xgrammar", grammar=f"root ::= {starts}\n{rules}")
    grammar_of(manager, request)
    token = manager.tokenizer.convert_tokens_to_ids("Q")
    assert manager.accept_tokens(request, [token] * 5)
    assert not manager.accept_tokens(request, [token] * 200)


def test_a_forbidden_token_is_refused(manager: Any) -> None:
    """Though the tokens are given to the grammar one by one."""
    letter, other = manager.tokenizer.convert_tokens_to_ids(["a", "b"])
    for backend in ("outlines", "guidance", "xgrammar"):
        for tokens, is_accepted in (([letter, other], False), ([letter, letter], True)):
            request = asking(backend, regex="a*")
            grammar_of(manager, request)
            assert manager.accept_tokens(request, tokens) == is_accepted, backend


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
