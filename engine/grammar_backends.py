"""What compiles a request's grammar in an engine: for each request the backend that it names.

vLLM's engine takes the backend of the first request that it sees for all that come later, whatever
the front end has found for them: one client's unusual schema, first in a fresh engine, and others'
grammars fail there until it ends. It also means that nobody can know beforehand how a grammar will
be compiled. Here each request has its own, which the router has tried.
"""

import copy
import time
from collections.abc import Iterable
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.structured_output.backend_types import StructuredOutputBackend, StructuredOutputGrammar

BITS = 32
"""Of one word of a mask of allowed tokens."""

MAX_STEP_S = 0.25
"""CPU seconds that a step may take for the grammar of one answer; it holds up all of the engine's.
The router lets no grammar pass that it has seen take so long, and cannot see all of its answers."""


def new_backend(name: str, config: VllmConfig, tokenizer: Any) -> StructuredOutputBackend:
    """A backend as vLLM's engine makes it.

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


def num_mask_words(config: VllmConfig, tokenizer: Any) -> int:
    """Of the widest mask that any backend fills."""
    return _words(max(config.model_config.get_vocab_size(), len(tokenizer)))


MAX_SLOW_STEPS = 2
"""The first mask of a large grammar may take long, without the others doing so."""


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
        return StructuredOutputManager._create_grammar(mine, request)

    def _fill_bitmasks(self, batch: Iterable[tuple[StructuredOutputGrammar, int, bool]]) -> None:
        for row in batch:
            start_s = time.thread_time()
            super()._fill_bitmasks((row,))
            if time.thread_time() - start_s > MAX_STEP_S:
                row[0].num_slow_steps = _num_slow_steps(row[0]) + 1

    def accept_tokens(self, request: Request, new_token_ids: list[int]) -> bool:
        """False ends the request with an error."""
        if request.structured_output_request is None:
            return True
        num_slow = _num_slow_steps(request.structured_output_request.grammar)
        return num_slow < MAX_SLOW_STEPS and super().accept_tokens(request, new_token_ids)

    def _backend_of(self, request: Request) -> StructuredOutputBackend:
        name = request.sampling_params.structured_outputs._backend
        if name not in self._backends:
            self._backends[name] = new_backend(name, self.vllm_config, self.tokenizer)
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


def _num_slow_steps(grammar: Any) -> int:
    # vLLM's grammars can be keys of no mapping, so it is written on them.
    return getattr(grammar, "num_slow_steps", 0)


def _words(num_bits: int) -> int:
    return (num_bits + BITS - 1) // BITS
