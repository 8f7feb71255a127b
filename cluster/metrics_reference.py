"""The metrics reference: Markdown tables of every metric, made from the metrics themselves.

Owns the tables' form; the names and help texts are those of who exports the metric.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric as Family
from ray.util.metrics import Counter, Metric

from cluster.scale_metrics import ScaleMetrics
from engine.metrics import BY_REPLICA
from engine.server import EngineMetrics
from router.engine_ends import EngineEnds
from router.metrics import PoolMetrics, RouterMetrics, unready_pairs_gauge
from router.traffic import TrafficMeter


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """One metric, under the name that it has in this project's code."""

    name: str
    """Of a counter with `_total`."""
    kind: str
    """`counter`, `gauge` or `histogram`."""
    labels: tuple[str, ...]
    meaning: str

    @property
    def is_exported_to_ray(self) -> bool:
        """Whether Ray's metrics ports show it, as `ray_` and its name."""
        return not self.name.startswith(BY_REPLICA)


def router_metrics() -> tuple[Described, ...]:
    """What each router exports."""
    registry = CollectorRegistry()
    RouterMetrics(registry, TrafficMeter(ttft_s=1.0, itl_s=1.0))
    EngineEnds(registry)
    unready_pairs_gauge(registry)
    pools = PoolMetrics((), CollectorRegistry()).collect()
    return (*_of_registry(registry), *(_of_family(family) for family in pools))


def engine_metrics() -> tuple[Described, ...]:
    """What each replica exports."""
    return tuple(_of_registry(EngineMetrics("decode", "replica").registry))


def scaling_metrics() -> tuple[Described, ...]:
    """What Serve's controller exports of an application."""
    metrics = vars(ScaleMetrics("application", share_wanted=0.9)).values()
    return tuple(_of_ray(each) for each in metrics if isinstance(each, Metric))


def metrics_reference() -> str:
    """The tables, one for each kind of process that exports metrics."""
    sections = (
        (
            "Routers",
            "On `/metrics`, and with the prefix `ray_` among Ray's metrics; those of each replica "
            f"(`{BY_REPLICA}*`) on `/metrics` only.",
            router_metrics(),
        ),
        ("Replicas", "Among Ray's metrics only, with the prefix `ray_`.", engine_metrics()),
        (
            "Scaling",
            "Exported by Serve's controller, among Ray's metrics only, with the prefix `ray_`.",
            scaling_metrics(),
        ),
    )
    return "\n\n".join(
        f"### {title}\n\n{where}\n\n{_table(metrics)}" for title, where, metrics in sections
    )


def _table(metrics: Iterable[Described]) -> str:
    rows = ["| metric | labels | type | meaning |", "|---|---|---|---|"]
    for each in metrics:
        labels = ", ".join(f"`{label}`" for label in each.labels)
        rows.append(f"| `{each.name}` | {labels} | {each.kind} | {each.meaning} |")
    return "\n".join(rows)


def _of_registry(registry: CollectorRegistry) -> Iterator[Described]:
    for metric in registry._collector_to_names:
        yield _described(metric._name, metric._type, metric._labelnames, metric._documentation)


def _of_family(family: Family) -> Described:
    labels: Any = family._labelnames
    return _described(family.name, family.type, labels, family.documentation)


def _of_ray(metric: Metric) -> Described:
    info = metric.info
    kind = "counter" if isinstance(metric, Counter) else "gauge"
    return _described(info["name"], kind, info["tag_keys"], info["description"])


def _described(name: str, kind: str, labels: Iterable[str], meaning: str) -> Described:
    suffix = "_total" if kind == "counter" else ""
    return Described(name=name + suffix, kind=kind, labels=tuple(labels), meaning=meaning)
