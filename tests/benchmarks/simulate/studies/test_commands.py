"""The smaller commands end to end, on small workloads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.simulate.cli import main
from benchmarks.simulate.model.profiles import LLAMA_8B_H100
from benchmarks.simulate.studies.compare import GOAL_ATTAINMENT, CompareOptions
from benchmarks.simulate.studies.internet_scale import measure_scale
from benchmarks.simulate.studies.published import (
    VLLM_POINTS,
    find_knee,
    make_workload,
    published_arrivals_s,
)
from benchmarks.simulate.studies.routing import OLD, PROFILES, REPORTS, study_routing
from benchmarks.simulate.studies.sizing import min_replicas_for, plan_fleet
from benchmarks.simulate.studies.step_load import format_step_load, measure_step_load
from benchmarks.simulate.workloads.traces import read_trace
from router.policies import POLICIES
from router.slo import Slo


def write_trace(path: Path, *, prompt_tokens: int = 4000) -> None:
    rows = (
        {"timestamp": number * 50, "input_length": prompt_tokens, "output_length": 100}
        for number in range(1200)
    )
    path.write_text("\n".join(json.dumps(row) for row in rows))


@pytest.mark.parametrize(
    ("rates", "shares", "knee"),
    [
        ([1, 2, 3], [0.95, 0.85, 0.5], 1.5),
        ([1, 2, 3], [0.95, 0.92, 0.91], 3.0),
        ([1, 2, 3], [0.8, 0.7, 0.6], 0.0),
    ],
)
def test_a_knee_lies_between_its_rates(
    rates: list[float], shares: list[float], knee: float
) -> None:
    assert find_knee(rates, shares) == pytest.approx(knee)


def test_published_lengths_fit_the_context() -> None:
    workload = make_workload(max(VLLM_POINTS), num_requests=500, seed=0)
    assert all(each.prompt_tokens + each.output_tokens < 2048 for each in workload)


def test_published_arrivals_are_those_of_the_published_runs() -> None:
    fast, slow = (published_arrivals_s(rate, 100) for rate in (2.0, 1.0))
    # What numpy's generator gives after seed(0): -log(1 - 0.5488135), -log(1 - 0.71518937).
    assert slow[:3] == pytest.approx([0.0, 0.79587451, 2.05180552])
    assert fast == pytest.approx([each / 2 for each in slow])


@pytest.mark.parametrize("needed", [1, 2, 3, 7, 8, 33])
def test_the_fewest_that_do_are_found(needed: int) -> None:
    asked: list[int] = []

    def share(size: int) -> float:
        asked.append(size)
        return min(size / needed, 1.0)

    assert min_replicas_for(share, 1.0) == needed
    assert len(asked) < 15


def test_no_number_of_replicas_is_said_to_do_where_none_does() -> None:
    assert min_replicas_for(lambda size: 0.5, 0.9) is None


def test_a_plan_holds_the_targets_and_has_a_price(tmp_path: Path) -> None:
    trace = tmp_path / "even.jsonl"
    write_trace(trace)
    (plan,) = plan_fleet(
        read_trace(trace),
        Slo(ttft_s=0.5, itl_s=0.05),
        [LLAMA_8B_H100],
        share=0.9,
        gpu_hour_price=3.6,
    )
    # 20 prompts a second of 4,000 tokens: 0.12 s each on an H100.
    assert plan.num_prefill is not None
    assert 2 <= plan.num_prefill <= 4
    assert plan.num_decode == 1
    assert plan.cost_per_million_tokens is not None
    gpu_s = (plan.num_prefill + 1) * 59.95
    assert plan.cost_per_million_tokens == pytest.approx(gpu_s * 1e-3 / (1200 * 4100) * 1e6)


def test_targets_that_nothing_can_hold_are_said_to_be_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "long.jsonl"
    write_trace(trace, prompt_tokens=60_000)
    slo = ["--slo", "ttft=0.5,itl=0.05"]
    factor = ["--factor", "0.02"]
    assert main(["plan", "--trace", str(trace), "--out", str(tmp_path), *slo, *factor]) == 0
    assert "an idle engine holds TTFT for 0.0% only" in capsys.readouterr().out


def test_no_router_is_much_better_than_one_that_knows_everything() -> None:
    rows = study_routing(num_requests=1500, seed=2)
    assert len(rows) == 2 * (1 + 3 * len(REPORTS)) + 3 * (len(POLICIES) - 1)
    assert all(row.vs_omniscient > 0.9 for row in rows)
    by_case = {
        (row.policy, row.reports, row.num_routers): row.vs_omniscient
        for row in rows
        if row.profile == PROFILES[0].name
    }
    assert by_case["p2c", OLD, 16] < by_case["random", OLD, 16]
    for reports in REPORTS:
        assert by_case["p2c", reports, 1] == pytest.approx(1.0, abs=0.05)
        assert by_case["p2c", reports, 1] < by_case["p2c", reports, 16]


def test_a_rise_that_nobody_announces_asks_for_more_than_a_load_that_stays() -> None:
    options = CompareOptions(
        profile=LLAMA_8B_H100,
        slo=Slo(ttft_s=0.5, itl_s=0.05),
        gpu_budget=64,
        mean_gpus=1.5,
        max_requests=120_000,
        seed=1,
    )
    found = measure_step_load(options)
    assert found.attainment >= GOAL_ATTAINMENT
    assert found.held_gpus > found.oracle_gpus
    assert found.staying_vs_oracle > 1.0
    verdict = "Both can be met" if found.is_within_goal else "Nobody who does not know"
    assert verdict in format_step_load(found)


def test_the_simulator_needs_neither_ray_nor_vllm() -> None:
    look = "import sys, benchmarks.simulate.cli; print({'ray', 'torch', 'vllm'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_a_thousand_replicas_are_measured() -> None:
    report = measure_scale(num_replicas=1000, num_routers=64, seconds=0.05)
    assert report.requests_per_s > 1000
    assert report.decisions_per_s > 0
    assert report.reports_per_s > 0
    assert report.state_bytes > 100_000
