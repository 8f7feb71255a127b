"""What has been seen of a run so far: arrivals, latencies, replicas; for those who plan."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.simulate.model.requests import Arrival, SimRequest


@dataclass(slots=True)
class Series:
    """Values by time, put in as time goes on, with sums that cost nothing to ask for."""

    times_s: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    sums: list[float] = field(default_factory=lambda: [0.0])

    def add(self, time_s: float, value: float) -> None:
        self.times_s.append(time_s)
        self.values.append(value)
        self.sums.append(self.sums[-1] + value)

    def since(self, time_s: float) -> Sequence[float]:
        return self.values[bisect_left(self.times_s, time_s) :]

    def count_since(self, time_s: float) -> int:
        return len(self.times_s) - bisect_left(self.times_s, time_s)

    def sum_since(self, time_s: float) -> float:
        return self.sums[-1] - self.sums[bisect_left(self.times_s, time_s)]

    def mean_since(self, time_s: float) -> float | None:
        count = self.count_since(time_s)
        return self.sum_since(time_s) / count if count else None


@dataclass(slots=True)
class History:
    """Owns the series of one run."""

    prompt_tokens: Series = field(default_factory=Series)
    """By arrival."""
    prefill_s: Series = field(default_factory=Series)
    """By arrival at a router: predicted engine seconds of what prefill is to read, or would be."""
    output_tokens: Series = field(default_factory=Series)
    """By end: nobody knows it before."""
    ttfts_s: Series = field(default_factory=Series)
    """By first token."""
    tpots_s: Series = field(default_factory=Series)
    """By end."""

    def arrived(self, arrival: Arrival) -> None:
        self.prompt_tokens.add(arrival.arrival_s, arrival.prompt_tokens)

    def first_token(self, request: SimRequest) -> None:
        assert request.first_token_s is not None
        self.ttfts_s.add(request.first_token_s, request.first_token_s - request.arrival.arrival_s)

    def ended(self, request: SimRequest) -> None:
        assert request.ended_s is not None
        self.output_tokens.add(request.ended_s, request.arrival.output_tokens)
        if request.arrival.output_tokens > 1:
            assert request.tpot_s is not None
            self.tpots_s.add(request.ended_s, request.tpot_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolView:
    """One pool at one moment, as its replicas report it."""

    num_ready: int
    num_starting: int
    num_draining: int
    num_waiting: int
    """Requests that wait in replicas, or for one."""
    num_ongoing: int
    """Requests in replicas, or that wait for one."""
    waiting_tokens: int
    """Prompt tokens that are not computed yet."""
    kv_tokens: int
    """In use, of all ready replicas."""
    kv_capacity_tokens: int
    """Of one replica."""

    @property
    def num_replicas(self) -> int:
        """That serve or will."""
        return self.num_ready + self.num_starting


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What a planner gets."""

    now_s: float
    prefill: PoolView
    decode: PoolView
    history: History
    prefill_backlog_s: float
    """Predicted engine seconds of prompts that are not yet prefilled."""
    num_decoding: int
    """Requests between their first token and their last."""
