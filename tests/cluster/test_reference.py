"""The generated parts of the documentation, and what of it says the same as code and results."""

import re
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.errors import ClusterError
from cluster.metrics_reference import (
    engine_metrics,
    metrics_reference,
    router_metrics,
    scaling_metrics,
)
from cluster.reference import CONFIG, METRICS, config_reference, replace_part

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(ROOT) for path in (*ROOT.glob("*.md"), *DOCS.rglob("*.md")))


@pytest.mark.parametrize(
    ("page", "command"),
    [
        pytest.param("configuration.md", "config-reference", id="config"),
        pytest.param("metrics.md", "metrics-reference", id="metrics"),
    ],
)
def test_generated_parts_are_current(page: str, command: str, tmp_path: Path) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    copy = tmp_path / page
    copy.write_text(text, encoding="utf-8")

    assert main([command, "--into", str(copy)]) == 0
    assert copy.read_text(encoding="utf-8") == text, "run: make docs"


def test_reference_has_a_row_per_field() -> None:
    rows = config_reference().splitlines()
    assert "| `scaling.expected_start_s` | number | `60` |" in rows[-1]
    assert "| `decode.*` | | | The same fields as `prefill.*`. |" in rows
    assert any(row.startswith("| `network.tls.key` | text | unset |") for row in rows)
    assert any(row.startswith("| `served_name` | text | unset |") for row in rows)


def test_reference_has_a_row_per_metric() -> None:
    text = metrics_reference()
    for row in (
        "| `pdserve_ttft_seconds` |  | histogram |",
        "| `pdserve_unready_pairs` |  | gauge |",
        "| `pdserve_replica_sent` | `pool`, `replica` | gauge |",
        "| `pdserve_kv_transfers_total` | `prefill_engine`, `decode_engine` | counter |",
        "| `pdserve_scale_input` | `application`, `pool`, `name` | gauge |",
    ):
        assert row in text


def test_only_what_is_between_the_markers_changes() -> None:
    begin, end = f"<!-- {CONFIG}:begin -->", f"<!-- {CONFIG}:end -->"
    text = f"before\n{begin}\nold\n{end}\nafter\n"
    assert replace_part(text, CONFIG, "new") == f"before\n{begin}\nnew\n{end}\nafter\n"


def test_missing_markers_are_refused() -> None:
    with pytest.raises(ClusterError):
        replace_part(f"<!-- {METRICS}:begin --> only", METRICS, "new")


@pytest.mark.parametrize("page", ["metrics.md", "operations.md", "failover.md", "routing.md"])
def test_pages_name_metrics_that_there_are(page: str) -> None:
    metrics = (*router_metrics(), *engine_metrics(), *scaling_metrics())
    names = {each.name for each in metrics} | {
        f"{each.name}{suffix}"
        for each in metrics
        if each.kind == "histogram"
        for suffix in ("_bucket", "_count", "_sum")
    }
    by_ray = {f"ray_{each.name}" for each in metrics if each.is_exported_to_ray} | {
        f"ray_{name}" for name in names
    }
    text = (DOCS / page).read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:ray_)?pdserve_\w+", text))
    assert {name for name in named if not name.endswith("_")} <= names | by_ray


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_pages_name_fields_that_there_are(page: Path) -> None:
    fields = set(re.findall(r"^\| `([\w.]+)`", config_reference(), flags=re.MULTILINE))
    fields |= {field.replace("prefill.", "decode.") for field in fields}
    sections = {field.split(".")[0] for field in fields if "." in field}
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"`(\w+\.\w+)(?:: [^`]*)?`", text)
    assert {name for name in named if name.split(".")[0] in sections - {"network"}} <= fields


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 8192
