"""What routers report through Serve, turned into the records that a scaling plan is made from.

Routers count up for as long as they live; a report is one look at all their counts. Owns the last
look at each router, so that differences can be taken. Reads no clock.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from cluster.scaling import Attainment, Engines, Load, Traffic
from kvtransfer.phase import Phase
from router.costs import DecodeCost
from router.scaling_report import ScalingReport, TrafficCounts

STALE_S = 15.0
"""A router that has reported nothing for this long does not count."""

UNKNOWN_ENGINES = Engines(decode=DecodeCost(), num_kv_tokens=10**9)
"""Before the first replica has joined: the priors, and a cache that limits nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What one router has reported at one moment."""

    router_id: str
    at_s: float
    report: ScalingReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What all routers that are alive say together."""

    traffic: tuple[Traffic, ...]
    load: Load
    engines: Engines
    num_ready: Mapping[Phase, int]
    """By pool: replicas that a router may send requests to."""
    num_draining: Mapping[Phase, int]


class Reports:
    """Owns what was last seen of each router."""

    def __init__(self) -> None:
        self._last: dict[str, Look] = {}
        self._until_s: float | None = None
        """End of the traffic that was handed out."""

    def observe(self, looks: Iterable[Look], now_s: float) -> Observed | None:
        """What came since the last call; None where no living router has reported lately.

        Args:
            looks: at the routers that Serve knows to run, in any order, old ones too.
        """
        begin_s = now_s if self._until_s is None else self._until_s
        buckets = [TrafficCounts()] * max(1, round(now_s - begin_s))
        alive: set[str] = set()
        for look in sorted(looks, key=lambda look: look.at_s):
            alive.add(look.router_id)
            if look.at_s > now_s + STALE_S:
                continue  # from before the time of day was set back
            before = self._last.get(look.router_id)
            if before is not None and look.at_s <= before.at_s:
                continue
            self._last[look.router_id] = look
            if before is not None:
                passed_s = max(0.0, look.at_s - begin_s)
                place = int(passed_s * len(buckets) / (now_s - begin_s or 1))
                buckets[min(place, len(buckets) - 1)] += look.report.counts.since(
                    before.report.counts
                )
        self._last = {key: each for key, each in self._last.items() if key in alive}
        latest = [each.report for each in self._last.values() if now_s - each.at_s < STALE_S]
        if not latest:
            return None
        self._until_s = now_s
        duration_s = (now_s - begin_s) / len(buckets)
        return Observed(
            traffic=tuple(_traffic(each, duration_s) for each in buckets) if duration_s else (),
            load=Load(
                prefill_backlog_s=sum(each.prefill_backlog_s for each in latest),
                num_decoding=sum(each.num_decoding for each in latest),
                kv_usage_fraction=max(each.kv_usage_fraction for each in latest),
            ),
            engines=_engines(latest),
            num_ready={
                "prefill": max(each.prefill.num_ready for each in latest),
                "decode": max(each.decode.num_ready for each in latest),
            },
            num_draining={
                "prefill": max(each.prefill.num_draining for each in latest),
                "decode": max(each.decode.num_draining for each in latest),
            },
        )


def _traffic(counts: TrafficCounts, duration_s: float) -> Traffic:
    return Traffic(
        duration_s=duration_s,
        num_arrivals=counts.arrivals,
        prefill_s=counts.arrived_prefill_s,
        prefill_squared_s2=counts.arrived_prefill_squared_s2,
        num_prompt_tokens=counts.prompt_tokens,
        num_ended=counts.ended,
        num_output_tokens=counts.output_tokens,
        ttft=Attainment(num=counts.ttft_measured, num_met=counts.ttft_met),
        itl=Attainment(num=counts.itl_measured, num_met=counts.itl_met),
    )


def _engines(latest: Sequence[ScalingReport]) -> Engines:
    costs = [each.decode_cost for each in latest]
    return Engines(
        decode=DecodeCost(
            base_s=fmean(each.base_s for each in costs),
            per_request_s=fmean(each.per_request_s for each in costs),
            per_context_token_s=fmean(each.per_context_token_s for each in costs),
        ),
        num_kv_tokens=max(
            (each.num_kv_tokens for each in latest if each.num_kv_tokens is not None),
            default=UNKNOWN_ENGINES.num_kv_tokens,
        ),
        max_batch=max(
            (each.max_batch for each in latest if each.max_batch is not None),
            default=UNKNOWN_ENGINES.max_batch,
        ),
    )
