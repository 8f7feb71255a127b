"""What each engine step computed and how long it took, for the routers' cost model.

Mixed into vLLM's scheduler, which alone knows both. The sample rides on the scheduler's own
statistics, in the one field with room for it: that of the encoder cache's connector, which engines
that move a KV cache do not have.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.metrics.stats import SchedulerStats


class StepSample(msgspec.Struct, frozen=True, array_like=True):
    """One engine step. A request of which it computed one token counts as decoding: so it costs.

    So does one with a draft, however many tokens of it the step checks.
    """

    number: int
    """Rises from step to step of one engine."""
    seconds: float
    num_prefill_tokens: int
    prefill_attention: int
    """Σ(end² - start²) over the pieces [start, end) of prompts."""
    num_decodes: int
    num_context_tokens: int
    """Of the requests that decode, together."""
    num_draft_tokens: int = 0
    """Of them too: what it checked beyond one token each."""

    @property
    def num_tokens(self) -> int:
        """All that it computed."""
        return self.num_prefill_tokens + self.num_decodes + self.num_draft_tokens


_KEY = "pdserve_step"


def step_sample(stats: SchedulerStats) -> StepSample | None:
    """The sample of the step that these statistics are of, if it computed anything."""
    carried = stats.ec_connector_stats or {}
    return msgspec.convert(carried[_KEY], StepSample) if _KEY in carried else None


class StepClock:
    """Times steps of which the next may be scheduled before the last is done. Owns their times."""

    def __init__(self) -> None:
        self._scheduled: deque[tuple[float, tuple[int, ...]]] = deque()
        self._done_s = 0.0
        self._number = 0

    def scheduled(
        self,
        pieces: Mapping[str, int],
        ends: Mapping[str, int],
        now_s: float,
        *,
        drafts: Mapping[str, Sequence[int]],
    ) -> None:
        """A step is on its way.

        Args:
            pieces: the number of tokens that it computes of each request.
            ends: how many tokens of each request will be computed then.
            drafts: of some requests, the tokens among these that it only checks.
        """
        num_prefill = attention = num_decodes = num_context = num_drafted = 0
        for request_id, num_tokens in pieces.items():
            end = ends[request_id]
            draft = len(drafts.get(request_id, ()))
            if num_tokens - draft == 1:
                num_decodes += 1
                num_context += end
                num_drafted += draft
            else:
                num_prefill += num_tokens
                attention += end**2 - (end - num_tokens) ** 2
        shape = (num_prefill, attention, num_decodes, num_context, num_drafted)
        self._scheduled.append((now_s, shape))

    def done(self, now_s: float) -> StepSample | None:
        """The oldest step on its way is done: it ran since it was scheduled, or since the one
        before it was done. None where it computed nothing."""
        scheduled_s, shape = self._scheduled.popleft()
        seconds = now_s - max(scheduled_s, self._done_s)
        self._done_s = now_s
        if not any(shape) or seconds <= 0:
            return None
        self._number += 1
        return StepSample(self._number, seconds, *shape)


class Measuring:
    """Mixed into vLLM's scheduler."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        self._clock = StepClock()
        self._sample: StepSample | None = None
        super().__init__(*args, **kwargs)

    def schedule(self: Any, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        pieces = output.num_scheduled_tokens
        # vLLM has counted the step's tokens as computed already.
        ends = {key: self.requests[key].num_computed_tokens for key in pieces}
        drafts = output.scheduled_spec_decode_tokens
        self._clock.scheduled(pieces, ends, time.monotonic(), drafts=drafts)
        return output

    def update_from_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._sample = self._clock.done(time.monotonic())
        return super().update_from_output(*args, **kwargs)  # type: ignore[misc]

    def make_stats(self: Any, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats: SchedulerStats | None = super().make_stats(*args, **kwargs)  # type: ignore[misc]
        if stats is not None and self._sample is not None:
            stats.ec_connector_stats = {**(stats.ec_connector_stats or {}), _KEY: self._sample}
        return stats
