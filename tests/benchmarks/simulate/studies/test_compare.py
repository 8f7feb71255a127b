"""The comparison end to end on small workloads, and the command line around it."""

import argparse
import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.simulate.autoscalers.foresight import FLOORS, RESERVES
from benchmarks.simulate.autoscalers.oracle import SHARE
from benchmarks.simulate.cli import main, parse_slo
from benchmarks.simulate.model.profiles import LLAMA_8B_H100
from benchmarks.simulate.studies.compare import BASELINES, CompareOptions, compare_workload
from benchmarks.simulate.workloads.scenarios import SCENARIOS, make_scenario
from router.slo import Slo

OPTIONS = CompareOptions(
    profile=LLAMA_8B_H100,
    slo=Slo(ttft_s=0.5, itl_s=0.05),
    gpu_budget=16,
    mean_gpus=4.0,
    max_requests=3000,
    seed=1,
)


def write_trace(path: Path) -> None:
    rng = random.Random(1)
    rows = []
    for second in range(300):
        rate = 8 if 100 <= second < 200 else 3
        for _ in range(rate):
            row = {
                "timestamp": second * 1000 + rng.randrange(1000),
                "input_length": rng.randrange(2000, 12000),
                "output_length": rng.randrange(50, 400),
            }
            rows.append(json.dumps(row))
    path.write_text("\n".join(rows))


def test_all_policies_run_and_the_oracle_holds_the_targets(tmp_path: Path) -> None:
    trace = tmp_path / "small.jsonl"
    write_trace(trace)
    comparison = compare_workload(str(trace), OPTIONS)
    rows = comparison.rows
    by_policy = {row.policy: row for row in rows}
    assert (
        set(by_policy)
        == set(comparison.outcomes)
        == {"oracle", "pdserve", "fixed-at-peak", *BASELINES}
    )
    assert by_policy["oracle"].attainment >= SHARE
    assert by_policy["oracle"].gpu_hours_vs_oracle == 1.0
    for row in rows:
        assert row.trace == "small"
        assert 0 <= row.attainment <= min(row.ttft_attainment, row.itl_attainment)
        assert row.gpu_hours > 0
        assert sum(asdict(row.causes).values()) == pytest.approx(1 - row.attainment)


def test_the_command_writes_rows_tables_and_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "small.jsonl"
    write_trace(trace)
    out = tmp_path / "out"
    command = ["compare", "--trace", str(trace), "--no-scenarios", "--out", str(out)]
    scale = ["--mean-gpus", "2", "--max-requests", "1000", "--processes", "1"]
    assert main([*command, *scale]) == 0
    rows = json.loads((out / "compare.json").read_text())
    assert {row["policy"] for row in rows} == {"oracle", "pdserve", "fixed-at-peak", *BASELINES}
    wanted = {"trace", "policy", "attainment", "gpu_hours_vs_oracle", "num_scalings"}
    assert all(wanted <= set(row) for row in rows)
    assert (out / "compare.md").read_text() == capsys.readouterr().out
    assert (out / "compare-small.png").stat().st_size > 1000
    reached = json.loads((out / "foresight.json").read_text())
    for floor in FLOORS:
        tried = [each["reserve"] for each in reached if each["floor"] == floor]
        assert tried
        assert tried == list(RESERVES[: len(tried)])
    assert (out / "foresight.png").stat().st_size > 1000


def test_a_trace_that_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing.csv"
    out = str(tmp_path / "out")
    assert main(["compare", "--trace", str(missing), "--no-scenarios", "--out", out]) == 2
    assert str(missing) in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "ttft=1", "ttft=1,itl=x", "ttft=1,itl=0", "ttft=1,itl=1,x=1"])
def test_targets_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        parse_slo(text)


def test_targets_are_read_in_seconds() -> None:
    assert parse_slo("ttft=0.5,itl=0.05") == Slo(ttft_s=0.5, itl_s=0.05)


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenarios_are_in_order_and_the_same_each_time(name: str) -> None:
    first = make_scenario(name, base_rate=1.0, seed=1, duration_s=100.0)
    assert first == make_scenario(name, base_rate=1.0, seed=1, duration_s=100.0)
    assert first == sorted(first, key=lambda each: each.arrival_s)
    assert 50 < len(first) < 400
