"""What the grammar of one answer may cost an engine: its work holds up the steps of all answers.

The router lets no grammar pass that it has seen take long, and cannot see all of its answers: a
grammar may be cheap for hundreds of tokens, and then take a second for each.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

import torch
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

MAX_STEP_S = 0.25
"""CPU seconds that a step may take for the grammar of one answer."""

MAX_SLOW_STEPS = 2
"""The first mask of a large grammar may take long, without the others doing so."""


class BudgetedGrammar(StructuredOutputGrammar):  # type: ignore[misc]
    """A grammar that takes no more tokens once its steps have been slow.

    Masks, accepted tokens and drafts count alike. The tokens of an answer that goes on in this
    engine are accepted in one step: each `MAX_STEP_S` of it counts as a slow one.
    """

    def __init__(
        self, grammar: StructuredOutputGrammar, clock: Callable[[], float] = time.thread_time
    ) -> None:
        self._grammar = grammar
        self._clock = clock
        self._step_s = 0.0
        self._num_slow_steps = 0

    def end_step(self) -> None:
        self._step_s = 0.0

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        """False, too, where the budget is used up."""
        for token in tokens:
            if self._is_used_up:
                return False
            with self._timed():
                is_accepted = self._grammar.accept_tokens(request_id, [token])
            if not is_accepted:
                return False
        return not self._is_used_up

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        """None of them, too, where the budget is used up."""
        if self._is_used_up:
            return []
        with self._timed():
            return list(self._grammar.validate_tokens(tokens))

    def rollback(self, num_tokens: int) -> None:
        with self._timed():
            self._grammar.rollback(num_tokens)

    def fill_bitmask(self, bitmask: torch.Tensor, batch_index: int) -> None:
        with self._timed():
            self._grammar.fill_bitmask(bitmask, batch_index)

    def is_terminated(self) -> bool:
        return bool(self._grammar.is_terminated())

    def reset(self) -> None:
        self._grammar.reset()

    @property
    def _is_used_up(self) -> bool:
        return self._num_slow_steps >= MAX_SLOW_STEPS

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        start_s = self._clock()
        yield
        self._step_s += self._clock() - start_s
        if self._step_s > MAX_STEP_S:
            self._num_slow_steps += 1
            self._step_s = 0.0
