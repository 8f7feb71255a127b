"""Long prompts are read in pieces while answers are being written, where the prompt asks for it.

A prompt may bring a limit for the steps that read of it (`engine.step_limit`). While there is one,
no step reads more than about fits into the strictest of the limits, or into some times that where
no answer is held up.
Only prompts are cut: the step's budget stays what it is, so that a request whose KV has come from
another engine, and whose answer goes on with a single token, never waits behind a piece.

vLLM has one limit for all requests, so a prompt that brings none is cut with the others. But it
does not wait for its turn: it starts at once, in addition to the piece.
"""

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from engine.step_limit import (
    IDLE_FACTOR,
    LEAST_PIECE,
    next_piece,
    num_at_once,
    share_of_one,
    step_limit_s,
)


class Pieces:
    """Mixed into vLLM's scheduler, before `engine.limits.Limits`, and before
    `engine.steps.Measuring`, whose last sample it learns from. Owns the size of the piece.

    It starts at the least, whence it doubles with each step that is in time.
    """

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._piece: float = min(LEAST_PIECE, self.max_num_scheduled_tokens)
        self._step_limit_s: float | None = None
        """Of the step that was scheduled last."""
        self._may_start = 0
        """How many more prompts with a limit that step may begin with, if it has a limit."""
        self._with_limit: set[str] = set()
        """Ids of requests that brought one: while there are none, steps cost nothing here."""

    def add_request(self: Any, request: Request) -> None:
        if _has_limit(request):
            self._with_limit.add(request.request_id)
        super().add_request(request)  # type: ignore[misc]

    def schedule(self: Any, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self._step_limit_s = None
        if self._with_limit:
            self._with_limit &= self.requests.keys()
            self._step_limit_s = self._strictest_limit_s()
            if self._step_limit_s is not None and not self._holds_up_answers():
                self._step_limit_s *= IDLE_FACTOR
        return super().schedule(*args, **kwargs)  # type: ignore[misc]

    def update_from_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = super().update_from_output(*args, **kwargs)  # type: ignore[misc]
        if self._sample is not None and self._step_limit_s is not None:
            self._piece = next_piece(
                self._piece,
                limit_s=self._step_limit_s,
                seconds=self._sample.seconds,
                num_prefill_tokens=self._sample.num_prefill_tokens,
                most=self.max_num_scheduled_tokens,
            )
        return outputs

    def _holds_up_answers(self: Any) -> bool:
        """Whether an answer waits for the next step to end. One whose KV is still under way will
        go on before that."""
        return bool(self.kv_holding_waiting) or not all(
            request.is_prefill_chunk for request in self.running
        )

    def _strictest_limit_s(self: Any) -> float | None:
        reading = (request for request in self.running if request.is_prefill_chunk)
        limits = (step_limit_s(each.sampling_params) for each in (*reading, *self.waiting))
        return min((each for each in limits if each is not None), default=None)

    def _limits(self: Any) -> list[int]:
        limits: list[int] = super()._limits()  # type: ignore[misc]
        if self._step_limit_s is None:
            return limits
        num_reading = sum(request.is_prefill_chunk for request in self.running)
        num_waiting = sum(_has_limit(request) for request in self.waiting)
        self._may_start = max(0, num_at_once(self._piece) - num_reading)
        num_prompts = num_reading + min(self._may_start, num_waiting)
        return [*limits, share_of_one(self._piece, num_prompts)]

    def _handle_blocked_waiting_request(self: Any, request: Request) -> bool:
        """Whether a request that waits may start, as far as it is in none of vLLM's own waits."""
        needs_turn = (
            self._step_limit_s is not None
            and request.num_computed_tokens == 0
            and _has_limit(request)
        )
        if needs_turn and not self._may_start:
            # Before vLLM and `engine.resume` have taken note that nothing else keeps it waiting.
            return False
        if not super()._handle_blocked_waiting_request(request):  # type: ignore[misc]
            return False
        self._may_start -= needs_turn
        return True


def _has_limit(request: Request) -> bool:
    return step_limit_s(request.sampling_params) is not None
