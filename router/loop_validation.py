"""What is left in the router's loop of vLLM's validation: what costs nothing.

vLLM compiles structural tags while it parses a request's body, and constraints that come with tools
while it prepares the prompt. Both are compiled in the sandbox, with limits, before an engine is
asked (`router.grammar_check`); compiled here they would hold everybody up, or end the router.
"""

import json

from vllm.config import ModelConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.structured_output import backend_xgrammar
from vllm.v1.structured_output.utils import grammar_is_likely_lark

from router.body_check import check_texts

MAX_LARK_LENGTH = 4_096
"""Of a grammar beside tools, which vLLM would convert in the loop. A longer one stays as it is, and
the tools are not constrained; vLLM does the same with what its compiler does not know."""


MAX_BAD_WORDS_LENGTH = 8_192
"""Of all bad words of a request, in characters. vLLM takes 128 words, of any length, and tokenises
them in the loop: a megabyte takes seconds."""


def check_lengths(params: SamplingParams) -> None:
    """Raises VLLMValidationError where the loop would be held up.

    All protocols meet here, whatever each calls its stop strings.
    """
    for name in ("stop", "bad_words"):
        texts: list[str] = getattr(params, name) or []
        if (excess := check_texts(name, texts)) is not None:
            raise VLLMValidationError(excess.message, parameter=name)
    if sum(map(len, params.bad_words or ())) > MAX_BAD_WORDS_LENGTH:
        raise VLLMValidationError(
            f"The bad words have more than {MAX_BAD_WORDS_LENGTH} characters together.",
            parameter="bad_words",
        )


def count_prompt_logprobs(params: SamplingParams, num_tokens: int, model: ModelConfig) -> int:
    """How many log probabilities of a prompt's tokens its answers will have."""
    vocab_size = model.get_vocab_size()
    num_best = vocab_size if params.prompt_logprobs == -1 else params.prompt_logprobs
    most = vocab_size if model.max_logprobs == -1 else model.max_logprobs
    if num_best is None or num_best > most:
        return 0  # vLLM refuses more, and says why.
    # Beside the best there is the token's own.
    num: int = params.n * num_tokens * (num_best + 1)
    return num


def compile_nothing_in_the_loop() -> None:
    """Replaces vLLM's function for this process."""
    backend_xgrammar.validate_xgrammar_grammar = validate_without_compiling


def validate_without_compiling(params: SamplingParams) -> None:
    """Takes what may be a good constraint.

    Raises:
        TypeError, ValueError, VLLMValidationError: as the function that it stands for, where that
            is seen without compiling.
    """
    constraint = params.structured_outputs
    if constraint is None:
        return
    if constraint.json:
        schema = constraint.json
        if isinstance(schema, str):
            schema = json.loads(schema)
        if backend_xgrammar.has_xgrammar_unsupported_json_features(schema):
            raise VLLMValidationError("The JSON schema has features that xgrammar does not know.")
    is_long = len(constraint.grammar or "") > MAX_LARK_LENGTH
    if is_long and grammar_is_likely_lark(constraint.grammar):
        raise VLLMValidationError("The grammar is too long to be combined with tools.")
    if constraint.structural_tag is not None:
        json.loads(constraint.structural_tag)
