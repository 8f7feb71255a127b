"""Rules of the code base that a reader should be able to rely on."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

RANKS = {
    "benchmarks": 0,
    "cluster": 1,
    "router": 2,
    "prefill": 3,
    "decode": 3,
    "engine": 4,
    "kvtransfer": 5,
}
"""Imports run from a lower rank to a higher one, never back."""

SIMULATOR = ("model", "workloads", "autoscalers", "studies")
"""Imports run from a later one to an earlier one."""

DECIDING = (
    "decode/failing_reads.py",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "cluster/scaling").glob("*.py"))),
    "router/admission.py",
    "router/cost_fit.py",
    "router/costs.py",
    "router/faults.py",
    "router/routes.py",
    "router/deadline_order.py",
    "engine/lateness.py",
    "engine/outstanding.py",
    "engine/step_limit.py",
    "router/ledger.py",
    "router/local_prefill.py",
    "router/pairs.py",
    "router/placement.py",
    "router/planner.py",
    "router/policies.py",
    "router/prediction.py",
    "router/prefixes.py",
    "router/slo_feasibility.py",
    "router/recovery.py",
    "router/transfer_fit.py",
    "router/transfers.py",
)
IMPURE = {"asyncio", "logging", "random", "ray", "time"}


def imported(path: Path) -> Iterator[str]:
    """Top-level names of the packages a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", RANKS)
def test_imports_run_one_way(package: str) -> None:
    modules = sorted((ROOT / package).rglob("*.py"))
    assert modules
    wrong = [
        (str(path.relative_to(ROOT)), name)
        for path in modules
        for name in imported(path)
        if name in RANKS and name != package and RANKS[name] <= RANKS[package]
    ]
    assert wrong == []


@pytest.mark.parametrize("folder", SIMULATOR)
def test_the_simulator_s_imports_run_one_way(folder: str) -> None:
    modules = sorted((ROOT / "benchmarks/simulate" / folder).glob("*.py"))
    assert modules
    later = SIMULATOR[SIMULATOR.index(folder) + 1 :]
    wrong = [
        (path.name, name)
        for path in modules
        for name in later
        if f"benchmarks.simulate.{name}" in path.read_text()
    ]
    assert wrong == []


@pytest.mark.parametrize("module", DECIDING)
def test_deciding_modules_are_pure(module: str) -> None:
    assert IMPURE.isdisjoint(imported(ROOT / module))


def test_kvtransfer_does_not_import_ray() -> None:
    modules = sorted((ROOT / "kvtransfer").rglob("*.py"))
    assert all("ray" not in set(imported(path)) for path in modules)
