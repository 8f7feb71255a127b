"""The first look at a GPU, where there is none: its plumbing on a CPU, and what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.device import NO_GPU_STATUS, main, parsed, run_step

ROOT = Path(__file__).resolve().parents[2]


def run_command(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.device", *arguments],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_every_step_runs_on_a_cpu_without_vllm_and_ray(tmp_path: Path) -> None:
    for name in ("vllm", "ray", "httpx", "matplotlib", "psutil"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('is not carried along')")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    small = ("--size-mib", "4", "--rounds", "1", "--step-s", "200")
    ran = run_command("--device", "cpu", *small, PYTHONPATH=path)
    told = json.loads(ran.stdout.splitlines()[-1])
    assert (ran.returncode, told["problems"], told["skipped"]) == (0, {}, {}), ran.stderr
    assert {"memory copy", "NIXL pull", "NIXL push"} <= told["figures"]["nixl"]["GB_per_s"].keys()
    assert "Gloo pair" in told["figures"]["pair"]["GB_per_s"]
    assert told["figures"]["death"]["seen_as"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    ran = run_command()
    assert ran.returncode == NO_GPU_STATUS
    assert ran.stderr.startswith("no GPU here: PyTorch ")
    assert json.loads(ran.stdout.splitlines()[-1]) == {
        "ok": False,
        "problem": ran.stderr.strip(),
    }


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "python -m benchmarks.device --wheels wheels" in capsys.readouterr().out


def test_wheels_that_cannot_be_installed(tmp_path: Path) -> None:
    (tmp_path / "broken-1-py3-none-any.whl").write_text("no archive")
    ran = run_command("--wheels", str(tmp_path))
    assert ran.returncode == 1
    told = json.loads(ran.stdout.splitlines()[-1])
    assert told == {"ok": False, "problem": f"what is in {tmp_path} cannot be installed here"}


def test_a_step_that_hangs_is_ended() -> None:
    options = parsed(["--device", "cpu", "--step-s", "0.01"])
    outcome = run_step("nixl", options)
    assert (outcome.figures, outcome.problem) == (None, "not done after 0.01 s")


def test_a_step_that_fails_says_why() -> None:
    options = parsed(["--device", "cpu", "--size-mib", "0", "--steps", "pair"])
    outcome = run_step("pair", options)
    assert outcome.figures is None
    assert outcome.problem is not None
