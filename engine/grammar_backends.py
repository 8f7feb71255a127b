"""What compiles a request's grammar in an engine: for each request the backend that it names.

vLLM's engine takes the backend of the first request that it sees for all that come later, whatever
the front end has found for them: one client's unusual schema, first in a fresh engine, and others'
grammars fail there until it ends. It also means that nobody can know beforehand how a grammar will
be compiled. Here each request has its own, which the router has tried.
"""

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import xgrammar
from vllm.config import VllmConfig
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_types import StructuredOutputBackend, StructuredOutputGrammar

from engine.grammar_budget import BudgetedGrammar

BITS = 32
"""Of one word of a mask of allowed tokens."""


def new_backend(
    name: str, config: VllmConfig, tokenizer: Any, *, num_threads: int
) -> StructuredOutputBackend:
    """A backend as vLLM's engine makes it, but for the number of threads that compile.

    vLLM has eight, which on a small machine leave the engine's own thread little of it.

    Raises:
        ValueError: there is none of this name.
    """
    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "vocab_size": config.model_config.get_vocab_size(),
    }
    match name:
        case "xgrammar":
            from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

            with _compiling_with(num_threads):
                return XgrammarBackend(config, **options)
        case "guidance":
            from vllm.v1.structured_output.backend_guidance import GuidanceBackend

            return GuidanceBackend(config, **options)
        case "outlines":
            from vllm.v1.structured_output.backend_outlines import OutlinesBackend

            return OutlinesBackend(config, **options)
        case "lm-format-enforcer":
            from vllm.v1.structured_output.backend_lm_format_enforcer import (
                LMFormatEnforcerBackend,
            )

            return LMFormatEnforcerBackend(config, **options)
    raise ValueError(f"no structured output backend is called {name!r}")


@contextlib.contextmanager
def _compiling_with(num_threads: int) -> Iterator[None]:
    compiler = xgrammar.GrammarCompiler

    def with_threads(*args: Any, **options: Any) -> Any:
        return compiler(*args, **{**options, "max_threads": num_threads})

    with mock.patch.object(xgrammar, "GrammarCompiler", with_threads):
        yield


def _num_threads() -> int:
    return max(1, min(8, len(os.sched_getaffinity(0)) // 2))


def num_mask_words(config: VllmConfig, tokenizer: Any) -> int:
    """Of the widest mask that any backend fills."""
    return _words(max(config.model_config.get_vocab_size(), len(tokenizer)))


class OneBackendEach(StructuredOutputManager):  # type: ignore[misc]
    """vLLM's manager, with a backend for each name. Made of one by `use_one_backend_each`."""

    backend: StructuredOutputBackend | None
    _backends: dict[str, StructuredOutputBackend]

    def grammar_init(self, request: Request) -> None:
        if request.structured_output_request is not None:
            backend = self._backend_of(request)
            # vLLM asks the first one for the memory that all masks are written to.
            self.backend = self.backend or backend
        super().grammar_init(request)

    def _create_grammar(self, request: Request) -> StructuredOutputGrammar:
        # In a thread: another request may have come meanwhile.
        mine = copy.copy(self)
        mine.backend = self._backend_of(request)
        return BudgetedGrammar(StructuredOutputManager._create_grammar(mine, request))

    def accept_tokens(self, request: Request, new_token_ids: list[int]) -> bool:
        """False ends the request with an error. The last that the engine does in a step for it."""
        is_accepted: bool = super().accept_tokens(request, new_token_ids)
        if request.structured_output_request is not None:
            request.structured_output_request.grammar.end_step()
        return is_accepted

    def _backend_of(self, request: Request) -> StructuredOutputBackend:
        name = request.sampling_params.structured_outputs._backend
        if name not in self._backends:
            self._backends[name] = new_backend(
                name, self.vllm_config, self.tokenizer, num_threads=_num_threads()
            )
        return self._backends[name]


def use_one_backend_each(manager: StructuredOutputManager) -> None:
    """Turns vLLM's manager into ours, before its first request."""
    config = manager.vllm_config
    if config.model_config.skip_tokenizer_init:
        return
    if num_mask_words(config, manager.tokenizer) != _words(config.model_config.get_vocab_size()):
        return  # their masks differ in size: vLLM's way is the only one
    manager.__class__ = OneBackendEach
    manager._backends = {}


class Grammars:
    """Mixed into vLLM's scheduler, which is given the manager when both are made."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        use_one_backend_each(self.structured_output_manager)


def _words(num_bits: int) -> int:
    return (num_bits + BITS - 1) // BITS
