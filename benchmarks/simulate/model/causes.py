"""Why requests missed their targets: each miss is put down to one cause.

Owns the record of a run's pools, second by second, that this takes. What each cause means stands
with its name in `Causes`; where several would fit, the first of them counts.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from benchmarks.simulate.model.fleet import Fleet
from benchmarks.simulate.model.requests import SimRequest
from router.slo import Slo

PERIOD_S = 1.0
STEADY_S = 30.0
"""Over which work is held against a pool's capacity: more than it means too few replicas, not a
burst."""
BURSTS_S = (1.0, 2.0, 4.0, 8.0, 16.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Causes:
    """Shares of all requests, by what made them miss."""

    too_long: float
    """TTFT: its prompt takes an idle engine longer than the target."""
    ttft_starting: float
    """TTFT: replicas that could not be had sooner were on their way."""
    ttft_too_few: float
    """TTFT: over the last half minute more came than the replicas can do, and none was starting."""
    ttft_burst: float
    """TTFT: more came than the replicas can do within the target, though not for long."""
    ttft_imbalance: float
    """TTFT: the pool had room; its replica did not."""
    itl_kv: float
    """ITL: it was preempted for want of KV cache."""
    itl_starting: float
    """ITL: a decode replica was on its way."""
    itl_too_few: float
    """ITL: too many shared a step, or it waited for KV cache, and none was starting."""


@dataclass(frozen=True, slots=True)
class _Arrived:
    """All prompts: when each came, and the engine seconds of all before it; a 0 first."""

    times_s: tuple[float, ...]
    sums_s: tuple[float, ...]

    def work_s(self, now_s: float, seconds: float) -> float:
        """What came within `seconds` up to and including `now_s`."""
        first = bisect_left(self.times_s, now_s - seconds)
        return self.sums_s[bisect_right(self.times_s, now_s)] - self.sums_s[first]


@dataclass(frozen=True, slots=True)
class _Second:
    prefill_ready: int
    prefill_starting: int
    decode_starting: int


class Witness:
    """Owns what it saw of one fleet; watches it from its making on."""

    def __init__(self, fleet: Fleet, slo: Slo) -> None:
        self.slo = slo
        self._fleet = fleet
        self._seconds: list[_Second] = []
        fleet.events.at(0.0, self._look)

    def _look(self) -> None:
        decode = self._fleet.decode
        prefill_view = self._fleet.prefill.view(0)
        self._seconds.append(
            _Second(
                prefill_view.num_ready,
                prefill_view.num_starting,
                decode.view(0).num_starting if decode else 0,
            )
        )
        self._fleet.events.after(PERIOD_S, self._look)

    def causes(self, requests: Sequence[SimRequest]) -> Causes:
        """The shares among `requests`, which are in order of arrival."""
        arrived = self._arrived()
        counts = dict.fromkeys(Causes.__slots__, 0)
        for request in requests:
            cause = self._cause(request, arrived)
            if cause is not None:
                counts[cause] += 1
        return Causes(**{name: count / len(requests) for name, count in counts.items()})

    def _arrived(self) -> "_Arrived":
        profile = self._fleet.spec.prefill
        arrivals = [each.arrival for each in self._fleet.requests]
        work_s = (
            profile.prefill.seconds(num_uncached=each.prompt_tokens, num_tokens=each.prompt_tokens)
            for each in arrivals
        )
        return _Arrived(
            tuple(each.arrival_s for each in arrivals), tuple(accumulate(work_s, initial=0.0))
        )

    def _cause(self, request: SimRequest, arrived: "_Arrived") -> str | None:
        ttft_s, tpot_s = request.ttft_s, request.tpot_s
        if ttft_s is None or ttft_s > self.slo.ttft_s:
            return self._late(request, arrived)
        if tpot_s is not None and tpot_s <= self.slo.itl_s:
            return None
        if request.num_preempted:
            return "itl_kv"
        second = self._seconds[int(request.arrival.arrival_s / PERIOD_S)]
        return "itl_starting" if second.decode_starting else "itl_too_few"

    def _late(self, request: SimRequest, arrived: "_Arrived") -> str:
        profile = self._fleet.spec.prefill
        if profile.idle_ttft_s(request.arrival.prompt_tokens) > self.slo.ttft_s:
            return "too_long"
        now_s = request.arrival.arrival_s
        second = self._seconds[int(now_s / PERIOD_S)]
        if second.prefill_starting:
            return "ttft_starting"

        def is_over(seconds: float) -> bool:
            covered_s = min(seconds, now_s + PERIOD_S)
            return arrived.work_s(now_s, seconds) > second.prefill_ready * covered_s

        if is_over(STEADY_S):
            return "ttft_too_few"
        windows = (self.slo.ttft_s, *BURSTS_S)
        return "ttft_burst" if any(is_over(each) for each in windows) else "ttft_imbalance"
