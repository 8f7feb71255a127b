"""An answer under a grammar, at random: what its steps cost an engine.

An engine computes each step's mask of allowed tokens in its own loop, for all of its answers. A
short grammar that reads one text in many ways can make that take a second a token.
"""

import random
import time

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

NUM_STEPS = 200
STEP_S = 0.1
"""CPU seconds. A step of a usual grammar takes less than a hundredth of it."""


def walk(grammar: StructuredOutputGrammar, num_mask_words: int, eos_token_id: int | None) -> None:
    """Raises ValueError where a step takes too long, or there is no answer at all."""
    rng = random.Random(0)
    # Not by vLLM's function, which pins memory where there is a GPU.
    mask = torch.full((1, num_mask_words), -1, dtype=torch.int32)
    # The first mask also makes what later ones use.
    grammar.fill_bitmask(mask, 0)
    if not mask.any():
        raise ValueError("the grammar takes no answer at all, not even an empty one")
    for _ in range(NUM_STEPS):
        tokens = _allowed(mask, eos_token_id)
        if not tokens.size:
            return
        start_s = time.process_time()
        is_accepted = grammar.accept_tokens("walk", [int(rng.choice(tokens))])
        if not is_accepted or grammar.is_terminated():
            return
        grammar.fill_bitmask(mask, 0)
        if time.process_time() - start_s > STEP_S:
            raise ValueError(
                f"the grammar is too ambiguous: a token takes longer than {STEP_S:g} s to check"
            )


def _allowed(mask: torch.Tensor, eos_token_id: int | None) -> NDArray[np.intp]:
    (tokens,) = np.nonzero(np.unpackbits(mask.numpy().view(np.uint8)[0], bitorder="little"))
    others: NDArray[np.intp] = tokens[tokens != eos_token_id]
    return others
