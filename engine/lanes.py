"""How much of which prompts goes into the next step: urgent ones first, and answers go on.

vLLM gives each step's tokens to the requests in its batch first, in the order they came in: one
long prompt leaves nothing to those that wait. With the policy `priority`, this part of the
scheduler has the batch in order of priority, and keeps room in the step for more urgent prompts
that wait. Prompts that have become late are put back, see `engine.lateness`. With any policy, those
that come with a limit are read in pieces while others' answers are written, see `engine.pieces`.
Owns vLLM's limit on the tokens of one prompt in a step, of which the operator's is the highest. The
step's own budget is left alone: an answer that joins needs one token of it.
"""

import time
from collections.abc import Iterable
from itertools import takewhile
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import Request

from engine.lateness import LastStep, put_back
from engine.pieces import FIRST_PIECE, next_piece, step_limit_s

LEAST_SHARE = 4
"""A prompt always gets one part in so many of a step's tokens if it is in the batch."""


def most_of_one_prompt(num_step_tokens: int, urgent: Iterable[int]) -> int | None:
    """How many of a step's tokens one prompt may take, so that more urgent ones that wait start.

    Args:
        urgent: the lengths of these prompts, the most urgent first; read as far as needed.
    """
    left, found = num_step_tokens, False
    least = max(1, num_step_tokens // LEAST_SHARE)
    for num_tokens in urgent:
        found = True
        left -= num_tokens
        if left <= least:
            return least
    return left if found else None


class Lanes:
    """Mixed into vLLM's scheduler, before `engine.steps.Measuring`, whose last sample it reads."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._set_limit = self.scheduler_config.long_prefill_token_threshold
        self._piece = FIRST_PIECE
        self._step_limits_s: dict[str, float] = {}
        """Of the prompts with a limit that are not read yet, by request id."""

    def add_request(self: Any, request: Request) -> None:
        params = request.sampling_params
        limit_s = step_limit_s(params.extra_args) if params is not None else None
        if limit_s is not None:
            self._step_limits_s[request.request_id] = limit_s
        super().add_request(request)  # type: ignore[misc]

    def schedule(self: Any, *args: Any, **kwargs: Any) -> SchedulerOutput:
        if self.policy == SchedulingPolicy.PRIORITY:
            self._put_back_late_prompts()
            self.running.sort()
        limits = (self._limit_for_long_prompts(), self._limit_beside_answers(), self._set_limit)
        self.scheduler_config.long_prefill_token_threshold = min(filter(None, limits), default=0)
        return super().schedule(*args, **kwargs)  # type: ignore[misc]

    def update_from_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = super().update_from_output(*args, **kwargs)  # type: ignore[misc]
        sample = self._sample
        if self._step_limits_s and sample and sample.num_prefill_tokens and sample.num_decodes:
            self._piece = next_piece(
                self._piece,
                num_read=sample.num_prefill_tokens,
                seconds=sample.seconds,
                limit_s=min(self._step_limits_s.values()),
                most=self.max_num_scheduled_tokens,
            )
        return outputs

    def _limit_beside_answers(self: Any) -> int | None:
        """A part of the piece for each prompt with a limit. It holds for others beside them too."""
        if not self._step_limits_s:
            return None
        self._step_limits_s = {
            request_id: limit_s
            for request_id, limit_s in self._step_limits_s.items()
            if (request := self.requests.get(request_id)) is not None and not _is_read(request)
        }
        writes = any(not request.is_prefill_chunk for request in self.running)
        if not self._step_limits_s or not writes:
            return None
        return max(1, self._piece // len(self._step_limits_s))

    def _put_back_late_prompts(self: Any) -> None:
        """Of those that the next step may begin: the late ones come first of all that wait.

        Priorities are latest starts, and arrival times on the clock that all routers share.
        """
        sample, now_s = self._sample, time.time()
        num_step_tokens = self.max_num_scheduled_tokens
        last = LastStep()
        if sample is not None:
            last = LastStep(
                seconds=sample.seconds,
                num_prefill_tokens=sample.num_prefill_tokens,
                is_full=sample.num_prefill_tokens + sample.num_decodes >= num_step_tokens,
            )
        reading = [
            (request.priority, request.num_tokens - request.num_computed_tokens)
            for request in self.running
            if request.is_prefill_chunk
        ]
        in_time, num_in_time = [], 0
        while self.waiting and num_in_time < num_step_tokens:
            first = self.waiting.peek_request()
            if first.num_computed_tokens or first.num_output_tokens:
                break
            later_ms = put_back(
                first.priority,
                first.num_tokens,
                num_ahead=num_in_time + sum(n for each, n in reading if each <= first.priority),
                arrival_s=first.arrival_time,
                now_s=now_s,
                last=last,
            )
            self.waiting.pop_request()
            if later_ms is None:
                in_time.append(first)
                num_in_time += first.num_tokens
            else:
                first.priority = later_ms
                self.waiting.add_request(first)
        for request in in_time:
            self.waiting.add_request(request)

    def _limit_for_long_prompts(self: Any) -> int | None:
        if self.policy != SchedulingPolicy.PRIORITY:
            return None
        reading = [request.priority for request in self.running if request.is_prefill_chunk]
        if not reading or not self.waiting:
            return None
        least_urgent = max(reading)
        urgent = takewhile(lambda request: request.priority < least_urgent, self.waiting)
        return most_of_one_prompt(
            self.max_num_scheduled_tokens,
            (request.num_tokens - request.num_computed_tokens for request in urgent),
        )


def _is_read(request: Request) -> bool:
    """Whether all of its prompt is in steps that are done or under way."""
    return bool(request.num_computed_tokens) and not request.is_prefill_chunk
