"""Compiles constraints as vLLM's front end does, and then as its engine does."""

import contextlib
from collections.abc import Sequence
from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import VLLMError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.structured_output.backend_types import StructuredOutputBackend, StructuredOutputGrammar
from vllm.v1.structured_output.request import get_structured_output_key

from engine.grammar_backends import new_backend, num_mask_words
from router.sandbox.grammar_walk import walk

WARM_UP: Sequence[dict[str, Any]] = (
    {"json_object": True},
    # Which vLLM's first choice does not know, and its second does.
    {"json": {"type": "integer", "multipleOf": 2}},
)


class Grammars:
    """Owns its backends: what they have cached is lost with the child."""

    def __init__(self, config: VllmConfig, tokenizer: Any) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._backends: dict[str, StructuredOutputBackend] = {}

    def warm_up(self) -> None:
        """Makes the backends that most constraints take, and imports what vLLM imports late."""
        for constraint in WARM_UP:
            with contextlib.suppress(VLLMError):
                self.compile(constraint)

    def compile(self, constraint: dict[str, Any]) -> dict[str, Any]:
        """What the front end has found out, where the engine can take the constraint.

        Raises:
            Exception: it cannot. Or the process ends: see `router.sandbox.limits`.
        """
        structured = StructuredOutputsParams(**constraint)
        SamplingParams(structured_outputs=structured)._validate_structured_outputs(
            self._config.model_config, self._config.structured_outputs_config, self._tokenizer
        )
        grammar = self._compile_in_engine(structured)
        walk(grammar, num_mask_words(self._config, self._tokenizer), self._tokenizer.eos_token_id)
        return {
            "backend": structured._backend,
            "was_auto": structured._backend_was_auto,
            "grammar": structured.grammar if "choice" in constraint else None,
        }

    def _compile_in_engine(self, structured: StructuredOutputsParams) -> StructuredOutputGrammar:
        name = structured._backend
        if (backend := self._backends.get(name)) is None:
            backend = new_backend(name, self._config, self._tokenizer)
            self._backends[name] = backend
        kind, text = get_structured_output_key(structured)
        return backend.compile_grammar(kind, text, stop_token_ids=None)
