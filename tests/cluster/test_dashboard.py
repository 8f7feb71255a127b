"""The Grafana dashboard asks for metrics and labels that there are."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

import cluster
from cluster.metrics_reference import engine_metrics, router_metrics, scaling_metrics
from cluster.reports import UNKNOWN_ENGINES
from cluster.scaling import (
    Attainment,
    Load,
    PoolCounts,
    PoolLimits,
    ScaleSettings,
    ScaleSnapshot,
    ScaleState,
    Targets,
    Traffic,
    plan_scale,
)

DASHBOARD = Path(cluster.__file__).parent / "dashboards" / "pdserve.json"
PANELS: list[dict[str, Any]] = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
TARGETS = [
    pytest.param(target["expr"], target["legendFormat"], id=f"{panel['title']} {target['refId']}")
    for panel in PANELS
    for target in panel.get("targets", ())
]
SUFFIXES = {"counter": ("",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def words(pattern: str, text: str) -> set[str]:
    """All comma-separated words in what the pattern's group matches."""
    return {
        word.strip() for found in re.findall(pattern, text) for word in found.split(",") if word
    }


def exported() -> dict[str, set[str]]:
    """The labels of every metric that Ray's metrics ports show, by the metric's name there."""
    return {
        f"ray_{each.name}{suffix}": {*each.labels, *(["le"] if suffix == "_bucket" else [])}
        for each in (*router_metrics(), *engine_metrics(), *scaling_metrics())
        for suffix in SUFFIXES[each.kind]
        if each.is_exported_to_ray
    }


@pytest.mark.parametrize(("expression", "legend"), TARGETS)
def test_what_is_asked_for_exists(expression: str, legend: str) -> None:
    names = exported()
    asked = words(r"(ray_\w+)", expression)
    assert asked
    assert asked <= names.keys()
    labels = set[str]().union(*(names[name] for name in asked))
    kept = words(r"by \(([^)]*)\)", expression)
    assert kept | words(r"[{,]\s*(\w+)=", expression) <= labels
    is_aggregated = re.search(r"\b(sum|max|histogram_quantile)\b", expression)
    assert words(r"\{\{(\w+)\}\}", legend) <= (kept if is_aggregated else labels)


def test_the_numbers_of_a_plan_that_are_asked_for() -> None:
    met = Attainment(num=10, num_met=9)
    counts = PoolCounts(num_ready=1)
    limits = PoolLimits(max_replicas=2)
    plan = plan_scale(
        ScaleSnapshot(
            now_s=10.0,
            traffic=(Traffic(duration_s=2.0, num_arrivals=10, ttft=met, itl=met),),
            load=Load(),
            prefill=counts,
            decode=counts,
            engines=UNKNOWN_ENGINES,
        ),
        ScaleSettings(
            targets=Targets(ttft_s=0.5, itl_s=0.05, share=0.9), prefill=limits, decode=limits
        ),
        ScaleState(),
    )
    asked = words(r'pdserve_scale_input\{name="(\w+)"\}', DASHBOARD.read_text().replace("\\", ""))
    assert asked
    assert asked <= {name for pool in (plan.prefill, plan.decode) for name, _ in pool.inputs}


def test_panels_have_ids_and_places_of_their_own() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for one, other in combinations((panel["gridPos"] for panel in PANELS), 2):
        assert (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
