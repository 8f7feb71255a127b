"""The transfer benchmark: its cases, its report, and a small real run of every way."""

import json
import os
from pathlib import Path

import pytest
import torch

from benchmarks import kv_transfer_report as report
from benchmarks.kv_transfer_chart import write_chart
from benchmarks.kv_transfer_kernel import vm_read
from benchmarks.kv_transfer_memory import Case, address_of, cases, new_memory, pieces
from benchmarks.kv_transfer_report import TARGET_SIZE_BYTES
from benchmarks.kv_transfer_rounds import Cell, measure, seconds_of
from benchmarks.kv_transfer_ways import COPY, GLOO, PULL, PUSH, VM_READ
from benchmarks.machine import Machine

KIB, MIB = 1 << 10, 1 << 20

MACHINE = Machine(
    cpu="a cpu",
    num_cores=2,
    memory_gib=24,
    system="Linux",
    versions=("torch 2",),
    real_time_client=False,
)


@pytest.mark.parametrize(
    ("sizes", "descriptors", "expected"),
    [
        pytest.param([64, 128], [64], [(64, 64), (128, 64)], id="whole descriptors"),
        pytest.param([64, 128], [128], [(128, 128)], id="too small a size"),
        pytest.param([100], [64], [], id="a broken descriptor"),
    ],
)
def test_cases(sizes: list[int], descriptors: list[int], expected: list[tuple[int, int]]) -> None:
    chosen = cases(sizes, descriptors)
    assert [(case.size_bytes, case.descriptor_bytes) for case in chosen] == expected


def test_descriptors_are_used_once_and_in_another_order_on_each_side() -> None:
    case = Case(size_bytes=64 * KIB, descriptor_bytes=KIB)
    assert sorted(case.here) == sorted(case.there) == list(range(64))
    assert case.here != case.there
    assert (case.here, case.there) == (case.here, case.there)


@pytest.mark.parametrize("num_descriptors", [1, 1500])
def test_vm_read_reads_every_descriptor(num_descriptors: int) -> None:
    """Of this very process; Linux takes 1024 at a time."""
    case = Case(size_bytes=num_descriptors * 64, descriptor_bytes=64)
    here, there = (
        new_memory(case.size_bytes, torch.device("cpu"), seed=seed) for seed in (1, 1 << 30)
    )
    vm_read(case, here, pid=os.getpid(), address=address_of(there))()
    order = (torch.tensor(case.here), torch.tensor(case.there))
    assert torch.equal(pieces(here, case)[order[0]], pieces(there, case)[order[1]])


@pytest.mark.parametrize(
    ("seconds", "num_runs"), [(0.0, 50), (0.05, 4), (10.0, 3)], ids=["short", "middling", "long"]
)
def test_short_transfers_are_repeated_more_often(seconds: float, num_runs: int) -> None:
    now_s = 0.0
    runs = 0

    def run() -> None:
        nonlocal now_s, runs
        now_s += seconds
        runs += 1

    assert seconds_of(run, lambda: now_s) == pytest.approx(seconds)
    assert runs == num_runs


def results_with(pull_s: tuple[float, ...]) -> dict[Cell, tuple[float, ...]]:
    taken = {COPY: (0.01,) * 3, VM_READ: (0.03, 0.04, 0.05), PULL: pull_s, GLOO: (0.2,) * 3}
    return {
        Cell(device="memory", way=way, size_bytes=size, descriptor_bytes=MIB): seconds
        for size in (MIB, TARGET_SIZE_BYTES)
        for way, seconds in taken.items()
    }


@pytest.mark.parametrize(
    ("pull_s", "ratio", "met"),
    [
        pytest.param((0.03, 0.04, 0.05), 1.0, True, id="as fast"),
        pytest.param((0.04, 0.05, 0.0625), 0.8, False, id="too slow"),
        pytest.param((0.03, 0.04, 5.0), 1.0, True, id="one bad round"),
    ],
)
def test_the_target_is_judged_within_a_round(
    pull_s: tuple[float, ...], ratio: float, met: bool
) -> None:
    (verdict,) = report.judge(results_with(pull_s))
    assert (verdict.cell.way, verdict.met) == (PULL, met)
    assert verdict.ratio == pytest.approx(ratio)


def test_files(tmp_path: Path) -> None:
    results = results_with((0.03, 0.04, 0.05))
    report.write(results, MACHINE, tmp_path / "new")
    write_chart(results, tmp_path / "new" / "kv_transfer.png")

    entries = json.loads((tmp_path / "new" / "kv_transfer.json").read_text())
    assert len(entries) == len(results)
    assert {
        "device": "memory",
        "way": PULL,
        "size_bytes": TARGET_SIZE_BYTES,
        "descriptor_bytes": MIB,
        "seconds": {"median": 0.04, "min": 0.03, "max": 0.05},
        "bytes_per_s": TARGET_SIZE_BYTES / 0.04,
    } in entries
    text = (tmp_path / "new" / "kv_transfer.md").read_text()
    assert "| NIXL pull | 1 MiB | 1.00 | ≥ 0.9 | yes |" in text
    assert "| 256 MiB | 26.84 (26.84 to 26.84) | 6.71 (5.37 to 8.95) |" in text
    assert "- CPU: 2 cores, a cpu" in text
    assert (tmp_path / "new" / "kv_transfer.png").stat().st_size > 10_000


def test_every_way_moves_the_right_bytes() -> None:
    """Between two real processes; `measure` compares what arrives."""
    chosen = cases([64 * KIB, 3 * MIB], [64 * KIB, MIB])
    results = measure("memory", torch.device("cpu"), chosen, num_rounds=1, say=print)
    assert {cell.way for cell in results} == {COPY, VM_READ, PULL, PUSH, GLOO}
    assert len(results) == len(chosen) * 5
    assert all(seconds > 0 for taken in results.values() for seconds in taken)
