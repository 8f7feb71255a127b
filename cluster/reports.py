"""What routers report through Serve, turned into the records that a scaling plan is made from.

Routers count up for as long as they live; a report is one look at all their counters. Owns the
last look at each router, so that differences can be taken. Reads no clock. See router.traffic for
the names.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.scaling import Attainment, Engines, Load, Traffic
from router.costs import DecodeCost

STALE_S = 15.0
"""A router that has reported nothing for this long does not count."""

UNKNOWN_ENGINES = Engines(decode=DecodeCost(), num_kv_tokens=10**9)
"""Before the first replica has joined: the priors, and a cache that limits nothing."""

Look = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One look at one router's counters."""

    router_id: str
    at_s: float
    values: Look


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What all routers that are alive say together."""

    traffic: tuple[Traffic, ...]
    load: Load
    engines: Engines
    num_ready: Mapping[str, int]
    """By pool: replicas that a router may send requests to."""
    num_draining: Mapping[str, int]


class Reports:
    """Owns what was last seen of each router."""

    def __init__(self) -> None:
        self._last: dict[str, Report] = {}
        self._until_s: float | None = None
        """End of the traffic that was handed out."""

    def observe(self, reports: Iterable[Report], now_s: float) -> Observed | None:
        """What came since the last call; None where no living router has reported lately.

        Args:
            reports: of the routers that Serve knows to run, in any order, old ones too.
        """
        begin_s = now_s if self._until_s is None else self._until_s
        num_buckets = max(1, round(now_s - begin_s))
        buckets: list[dict[str, float]] = [{} for _ in range(num_buckets)]
        alive: set[str] = set()
        for report in sorted(reports, key=lambda report: report.at_s):
            alive.add(report.router_id)
            if report.at_s > now_s + STALE_S:
                continue  # from before the time of day was set back
            before = self._last.get(report.router_id)
            if before is not None and report.at_s <= before.at_s:
                continue
            self._last[report.router_id] = report
            if before is not None:
                place = int(max(0.0, report.at_s - begin_s) * num_buckets / (now_s - begin_s or 1))
                _add_difference(buckets[min(place, num_buckets - 1)], before.values, report.values)
        self._last = {key: each for key, each in self._last.items() if key in alive}
        latest = [each.values for each in self._last.values() if now_s - each.at_s < STALE_S]
        if not latest:
            return None
        self._until_s = now_s
        duration_s = (now_s - begin_s) / num_buckets
        return Observed(
            traffic=tuple(_traffic(each, duration_s) for each in buckets) if duration_s else (),
            load=Load(
                prefill_backlog_s=sum(each["prefill_backlog_s"] for each in latest),
                num_decoding=round(sum(each["num_decoding"] for each in latest)),
                kv_usage_fraction=max(each["kv_usage_fraction"] for each in latest),
            ),
            engines=_engines(latest),
            num_ready={pool: _most(latest, f"{pool}_ready") for pool in ("prefill", "decode")},
            num_draining={
                pool: _most(latest, f"{pool}_draining") for pool in ("prefill", "decode")
            },
        )


def _add_difference(bucket: dict[str, float], before: Look, after: Look) -> None:
    for name, value in after.items():
        bucket[name] = bucket.get(name, 0.0) + max(0.0, value - before.get(name, 0.0))


def _traffic(bucket: Look, duration_s: float) -> Traffic:
    def count(name: str) -> int:
        return round(bucket.get(name, 0.0))

    return Traffic(
        duration_s=duration_s,
        num_arrivals=count("arrivals"),
        prefill_s=bucket.get("arrived_prefill_s", 0.0),
        prefill_squared_s2=bucket.get("arrived_prefill_squared_s2", 0.0),
        num_prompt_tokens=count("prompt_tokens"),
        num_ended=count("ended"),
        num_output_tokens=count("output_tokens"),
        ttft=Attainment(num=count("ttft_measured"), num_met=count("ttft_met")),
        itl=Attainment(num=count("itl_measured"), num_met=count("itl_met")),
    )


def _engines(latest: list[Look]) -> Engines:
    def mean(name: str) -> float:
        return sum(each[name] for each in latest) / len(latest)

    return Engines(
        decode=DecodeCost(
            base_s=mean("decode_base_s"),
            per_request_s=mean("decode_per_request_s"),
            per_context_token_s=mean("decode_per_context_token_s"),
        ),
        num_kv_tokens=_most(latest, "num_kv_tokens") or UNKNOWN_ENGINES.num_kv_tokens,
        max_batch=_most(latest, "max_batch") or UNKNOWN_ENGINES.max_batch,
    )


def _most(latest: list[Look], name: str) -> int:
    return round(max(each.get(name, 0.0) for each in latest))
