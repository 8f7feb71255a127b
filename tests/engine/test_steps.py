"""Samples of engine steps: what they computed, and when they ran."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.metrics.stats import SchedulerStats

from engine import steps
from engine.steps import Measuring, StepClock, StepSample, step_sample


def test_what_a_step_computed() -> None:
    clock = StepClock()
    pieces = {"new": 10, "second-piece": 4, "a": 1, "b": 1}
    clock.scheduled(pieces, ends(10, 12, 100, 50), 5.0, drafts={})
    assert clock.done(5.5) == StepSample(
        number=1,
        seconds=0.5,
        num_prefill_tokens=14,
        prefill_attention=100 + (144 - 64),
        num_decodes=2,
        num_context_tokens=150,
    )


def test_an_answer_whose_draft_is_checked_is_no_prompt() -> None:
    clock = StepClock()
    pieces = {"new": 10, "second-piece": 4, "a": 4, "b": 2}
    drafts = {"a": [-1, -1, -1], "b": [9]}
    clock.scheduled(pieces, ends(10, 12, 100, 50), 5.0, drafts=drafts)
    sample = clock.done(5.5)
    assert sample == StepSample(
        number=1,
        seconds=0.5,
        num_prefill_tokens=14,
        prefill_attention=100 + (144 - 64),
        num_decodes=2,
        num_context_tokens=150,
        num_draft_tokens=4,
    )
    assert sample.num_tokens == sum(pieces.values())


def ends(*num_tokens: int) -> dict[str, int]:
    return dict(zip(("new", "second-piece", "a", "b"), num_tokens, strict=True))


def test_a_step_that_was_scheduled_early_runs_from_the_end_of_the_one_before() -> None:
    clock = StepClock()
    for now_s in (0.0, 0.1):
        clock.scheduled({"a": 1}, {"a": 10}, now_s, drafts={})
    samples = [clock.done(now_s) for now_s in (1.0, 1.5)]
    assert [sample and sample.seconds for sample in samples] == [1.0, 0.5]
    assert [sample and sample.number for sample in samples] == [1, 2]


def test_a_step_without_tokens_is_no_sample_but_time_passes() -> None:
    clock = StepClock()
    clock.scheduled({}, {}, 0.0, drafts={})
    assert clock.done(1.0) is None
    clock.scheduled({"a": 1}, {"a": 10}, 0.5, drafts={})
    sample = clock.done(1.25)
    assert sample is not None
    assert (sample.number, sample.seconds) == (1, 0.25)


@dataclass
class Scheduler:
    """As much of vLLM's as the mixin touches."""

    requests: dict[str, Any] = field(
        default_factory=lambda: {"a": SimpleNamespace(num_computed_tokens=0)}
    )
    log_stats: bool = True

    def schedule(self) -> Any:
        self.requests["a"].num_computed_tokens += 8
        return SimpleNamespace(num_scheduled_tokens={"a": 8}, scheduled_spec_decode_tokens={})

    def update_from_output(self) -> SchedulerStats | None:
        return self.make_stats()

    def make_stats(self) -> SchedulerStats | None:
        return SchedulerStats(num_running_reqs=3) if self.log_stats else None


class Measured(Measuring, Scheduler):
    pass


def test_the_sample_rides_on_the_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((10.0, 10.25, 11.0, 11.5))
    monkeypatch.setattr(steps, "time", SimpleNamespace(monotonic=lambda: next(times)))
    scheduler = Measured()
    seen = []
    for _ in range(2):
        scheduler.schedule()
        seen.append(scheduler.update_from_output())
    assert [stats and stats.num_running_reqs for stats in seen] == [3, 3]
    assert [stats and step_sample(stats) for stats in seen] == [
        StepSample(1, 0.25, 8, 64, 0, 0),
        StepSample(2, 0.5, 8, 256 - 64, 0, 0),
    ]


def test_without_statistics_there_is_nothing_to_ride_on() -> None:
    scheduler = Measured(log_stats=False)
    scheduler.schedule()
    assert scheduler.update_from_output() is None
