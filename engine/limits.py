"""How many tokens of one request a step computes at most: the least that any part asks for.

vLLM has one such limit for all requests, which the operator may set. Parts of the scheduler that
want another for the next step add theirs to `_limits`; nothing else writes to vLLM's.
"""

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput


class Limits:
    """Mixed into vLLM's scheduler, after the parts that limit. Owns what the operator has set."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._set_limit = self.scheduler_config.long_prefill_token_threshold
        self._set_adaptive = self.adaptive_long_prefill_threshold

    def schedule(self: Any, *args: Any, **kwargs: Any) -> SchedulerOutput:
        limits = self._limits()
        # With this set, vLLM gives more than the limit says where few requests are there.
        self.adaptive_long_prefill_threshold = self._set_adaptive and not limits
        if self._set_limit:
            limits.append(self._set_limit)
        self.scheduler_config.long_prefill_token_threshold = min(limits, default=0)
        return super().schedule(*args, **kwargs)  # type: ignore[misc]

    def _limits(self) -> list[int]:
        """Those of the next step, all above 0. Parts add theirs to what `super` returns."""
        return []
