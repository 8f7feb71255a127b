"""Prompts that must start sooner go first, also past one that is being read.

vLLM gives each step's tokens to the requests in its batch first, in the order they came in: one
long prompt leaves nothing to those that wait. With the policy `priority`, this part of the
scheduler has the batch in order of priority, and keeps room in the step for more urgent prompts
that wait. Prompts that have become late are put back, see `engine.lateness`. Owns nothing.
"""

import time
from collections.abc import Iterable
from itertools import takewhile
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.request import Request

from engine.lateness import LastStep, put_back_late_prompts

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
    """Mixed into vLLM's scheduler, before `engine.limits.Limits`, and before
    `engine.steps.Measuring`, whose last sample it reads."""

    def add_request(self: Any, request: Request) -> None:
        """Priorities are latest starts, and arrival times on the clock that all routers share, the
        time of day. From here on they are on this engine's monotonic clock: setting the time of day
        changes nothing among those that wait."""
        if self.policy == SchedulingPolicy.PRIORITY:
            # What came at a time that is yet to be, came before the time was set back: now.
            ahead_s = max(request.arrival_time, time.time()) - time.monotonic()
            request.arrival_time -= ahead_s
            request.priority -= round(1000 * ahead_s)
        super().add_request(request)  # type: ignore[misc]

    def schedule(self: Any, *args: Any, **kwargs: Any) -> SchedulerOutput:
        if self.policy == SchedulingPolicy.PRIORITY:
            self._put_back_late_prompts()
            self.running.sort()
        return super().schedule(*args, **kwargs)  # type: ignore[misc]

    def _limits(self: Any) -> list[int]:
        limits: list[int] = super()._limits()  # type: ignore[misc]
        if self.policy != SchedulingPolicy.PRIORITY:
            return limits
        limit = self._limit_for_long_prompts()
        return limits if limit is None else [*limits, limit]

    def _put_back_late_prompts(self: Any) -> None:
        sample = self._sample
        num_step_tokens = self.max_num_scheduled_tokens
        last = LastStep()
        if sample is not None:
            last = LastStep(
                seconds=sample.seconds,
                num_prefill_tokens=sample.num_prefill_tokens,
                is_full=sample.num_tokens >= num_step_tokens,
            )
        put_back_late_prompts(
            self.waiting,
            reading=[
                (request.priority, request.num_tokens - request.num_computed_tokens)
                for request in self.running
                if request.is_prefill_chunk
            ],
            num_step_tokens=num_step_tokens,
            now_s=time.monotonic(),
            last=last,
        )

    def _limit_for_long_prompts(self: Any) -> int | None:
        reading = [request.priority for request in self.running if request.is_prefill_chunk]
        if not reading or not self.waiting:
            return None
        least_urgent = max(reading)
        urgent = takewhile(lambda request: request.priority < least_urgent, self.waiting)
        return most_of_one_prompt(
            self.max_num_scheduled_tokens,
            (request.num_tokens - request.num_computed_tokens for request in urgent),
        )
