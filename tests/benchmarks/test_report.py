"""The comparison's report, from a fixed set of rounds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from benchmarks.chart import write_chart
from benchmarks.machine import Machine
from benchmarks.measure import Metrics
from benchmarks.report import (
    METRICS,
    SHOWN,
    SPLIT,
    TARGETS,
    Target,
    Verdict,
    compare_json,
    compare_markdown,
    embed,
    judge,
    median_ratio,
    write,
)

ROOT = Path(__file__).parents[2]
MACHINE = Machine(
    cpu="a CPU",
    num_cores=2,
    memory_gib=24.0,
    system="Linux 6",
    versions=("vllm 0.32.0",),
    real_time_client=True,
)
FAST = Metrics(
    ttft_s_p50_20=0.006,
    ttft_s_p50_500=0.022,
    itl_s_mean=0.002,
    handover_s_p50=0.005,
    tokens_per_s_c8=1800.0,
    ttft_s_p50_c8=0.05,
    ttft_s_p90_c8=0.08,
    tokens_per_s_c32=2400.0,
    ttft_s_p50_c32=0.2,
    ttft_s_p90_c32=0.3,
    idle_cores=0.02,
    client_cores_c32=0.1,
)
SLOW = replace(FAST, ttft_s_p50_20=0.06, tokens_per_s_c32=600.0)
ROUNDS = {
    "vllm": [FAST, FAST, FAST],
    "ray-llm": [SLOW, SLOW, SLOW],
    "ray-llm-tuned": [SLOW, SLOW, SLOW],
    "before": [SLOW, SLOW, SLOW],
    "pdserve": [FAST, replace(FAST, ttft_s_p50_20=0.018), FAST],
    "pdserve-split": [FAST, FAST, FAST],
}


@pytest.mark.parametrize(
    ("numerators", "denominators", "expected"),
    [
        pytest.param([2.0], [4.0], 0.5, id="one round"),
        pytest.param([1.0, 10.0, 3.0], [1.0, 5.0, 1.0], 2.0, id="of ratios, not of values"),
    ],
)
def test_median_ratio(numerators: list[float], denominators: list[float], expected: float) -> None:
    assert median_ratio(numerators, denominators) == expected


@pytest.mark.parametrize(
    ("bound", "ratio", "met"),
    [
        pytest.param("at most", 1.5, True, id="at most, on the limit"),
        pytest.param("at most", 1.51, False, id="at most, over it"),
        pytest.param("at least", 1.5, True, id="at least, on the limit"),
        pytest.param("at least", 1.49, False, id="at least, under it"),
    ],
)
def test_verdict(bound: Literal["at most", "at least"], ratio: float, met: bool) -> None:
    target = Target(metric="itl_s_mean", over="vllm", bound=bound, limit=1.5)

    assert Verdict(target=target, ratio=ratio).met is met


def test_judge_every_target() -> None:
    ratios = {(v.target.metric, v.target.over): v.ratio for v in judge(ROUNDS, SPLIT)}

    assert len(ratios) == len(TARGETS)
    assert ratios["ttft_s_p50_20", "vllm"] == 1.0
    assert ratios["ttft_s_p50_20", "ray-llm-tuned"] == pytest.approx(0.1)
    assert ratios["tokens_per_s_c32", "ray-llm-tuned"] == 4.0
    assert ratios["handover_s_p50", "itl_s_mean"] == 2.5


@pytest.mark.parametrize(
    ("systems", "num_verdicts"),
    [
        pytest.param(["vllm", "ray-llm"], 0, id="without this project"),
        pytest.param(["vllm", "pdserve"], 5, id="with one peer"),
        pytest.param(["before", "pdserve"], 1, id="another checkout is split, this is not"),
        pytest.param(["pdserve"], 1, id="alone: against itself"),
    ],
)
def test_judge_what_was_measured(systems: list[str], num_verdicts: int) -> None:
    assert len(judge({system: ROUNDS[system] for system in systems})) == num_verdicts


def test_json() -> None:
    summary = json.loads(compare_json(ROUNDS))

    assert list(summary) == list(ROUNDS)
    assert all(list(of_system) == list(METRICS) for of_system in summary.values())
    assert summary["pdserve"]["ttft_s_p50_20"] == {"median": 0.006, "min": 0.006, "max": 0.018}


def test_markdown() -> None:
    rounds = {system: of_system for system, of_system in ROUNDS.items() if system != "before"}
    lines = compare_markdown(rounds, MACHINE).splitlines()
    text = "\n".join(lines)

    own = "its own mean ITL, one client = 1"
    for subject in ("pdserve", "pdserve, always split"):
        assert f"| {subject} | bare vLLM = 1 | tuned Ray Serve LLM P/D = 1 | {own} |" in lines
    assert (
        "| TTFT p50, one client, 20-token prompt | 1.00 (≤ 1.5: yes) | 0.10 (≤ 0.3: yes) |  |"
        in lines
    )
    assert "| output, 8 clients, 200 in / 32 out |  | 1.00 (≥ 1.8: **no**) |  |" in lines
    assert "6.0 (6.0 to 18.0)" in text
    assert "2 cores, a CPU" in text


def test_the_readme_has_the_committed_figures() -> None:
    summary = json.loads((ROOT / "benchmarks/results/compare.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")

    assert "| TTFT p50, one client, 20-token prompt, ms |" in readme
    assert embed(readme, summary) == readme


def test_every_metric_is_shown() -> None:
    assert set(SHOWN) == set(METRICS)


def test_files(tmp_path: Path) -> None:
    write(ROUNDS, MACHINE, tmp_path / "results")
    write_chart(ROUNDS, tmp_path / "results" / "compare.png")

    assert {path.name for path in (tmp_path / "results").iterdir()} == {
        "compare.json",
        "compare.md",
        "compare.png",
    }
