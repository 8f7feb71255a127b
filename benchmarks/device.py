"""The first look at a GPU: moves KV in its memory by NIXL and by NCCL, within five minutes.

Owns the steps, each in a process of its own with a limit of time, so that one that hangs or fails
costs nothing of the others. `python -m benchmarks.device --help` is the command.

Made for a machine with little on it: it needs PyTorch for CUDA, and of what is not there the wheels
that are carried along, msgspec and NIXL; no vLLM, no Ray.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NO_GPU_STATUS = 2
_STEPS = {
    "nixl": "NIXL reads and writes between two processes, beside a copy by the device",
    "pair": "the `nccl` connector's own path between two processes, beside a copy by the device",
    "death": "the other process is killed while it sends: how soon that is seen",
}
_EXAMPLES = """\
examples:
  python -m benchmarks.device
      on a machine with a GPU; with two of them NCCL as well
  pip download --no-deps --only-binary=:all: -d wheels msgspec nixl nixl-cu13
  python -m benchmarks.device --wheels wheels
      where these are missing and nothing can be fetched (nixl-cu12 for a PyTorch of CUDA 12)
  python -m benchmarks.device --device cpu --size-mib 16 --step-s 60
      its plumbing, without a GPU: NIXL and Gloo in main memory

The last line is JSON. Status: 0 all is well, 1 a step failed, 2 there is no GPU.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a step: its figures, or why there are none."""

    figures: Mapping[str, Any] | None
    skipped: str | None = None
    problem: str | None = None


def run_step(name: str, options: argparse.Namespace) -> Outcome:
    """In a process of its own, ended after `--step-s`. Its last line is JSON; the rest is shown."""
    command = [sys.executable, "-m", "benchmarks.device_steps", name, options.device]
    command += [str(options.size_mib), str(options.rounds)]
    try:
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=options.step_s)
    except subprocess.TimeoutExpired as late:
        said = late.stdout or b""
        print(said.decode(errors="replace") if isinstance(said, bytes) else said, end="")
        return Outcome(figures=None, problem=f"not done after {options.step_s:g} s")
    *progress, last = ran.stdout.splitlines() or [""]
    print("".join(f"{line}\n" for line in progress), end="", flush=True)
    if ran.returncode:
        print(last)
        return Outcome(figures=None, problem=f"it ended with status {ran.returncode}")
    told: dict[str, Any] = json.loads(last)
    return Outcome(**told)


def device_problem(device: str) -> str | None:
    """Why there is nothing to measure, if so."""
    try:
        import torch
    except ImportError as error:
        return f"PyTorch cannot be imported: {error}"
    if device == "cuda" and not torch.cuda.is_available():
        return f"no GPU here: PyTorch {torch.__version__} sees none"
    return None


def use_wheels(folder: Path) -> None:
    """Starts this command once more, with what is in the wheels. Raises CalledProcessError."""
    wheels = sorted(str(wheel) for wheel in folder.glob("*.whl"))
    site = tempfile.mkdtemp(prefix="wheels-")
    install = ["-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", site]
    subprocess.run([sys.executable, *install, *wheels], check=True)
    path = os.pathsep.join([site, *filter(None, [os.environ.get("PYTHONPATH")])])
    rest = [word for word in sys.argv[1:] if not word.startswith("--wheels=")]
    if "--wheels" in rest:
        at = rest.index("--wheels")
        del rest[at : at + 2]
    command = [sys.executable, "-m", "benchmarks.device", *rest]
    os.execve(sys.executable, command, os.environ | {"PYTHONPATH": path})


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    steps = "\n".join(f"  {name:6} {what}" for name, what in _STEPS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device",
        description=f"Moves memory of a GPU between two processes as KV is moved:\n\n{steps}",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", nargs="+", choices=_STEPS, default=list(_STEPS))
    parser.add_argument("--size-mib", type=int, default=256, help="of a transfer (256)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way (3)")
    parser.add_argument("--step-s", type=float, default=80.0, help="limit of a step (80)")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to be used")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    options = parsed(arguments)
    if options.wheels is not None:
        try:
            use_wheels(options.wheels)
        except subprocess.CalledProcessError:
            said = f"what is in {options.wheels} cannot be installed here"
            print(json.dumps({"ok": False, "problem": said}))
            return 1
    begin_s = time.monotonic()
    if (problem := device_problem(options.device)) is not None:
        print(problem, file=sys.stderr)
        print(json.dumps({"ok": False, "problem": problem}))
        return NO_GPU_STATUS
    outcomes: dict[str, Outcome] = {}
    for name in options.steps:
        print(f"{name}: {_STEPS[name]}", flush=True)
        outcomes[name] = outcome = run_step(name, options)
        if outcome.figures is None:
            print(f"    {outcome.skipped or outcome.problem}", flush=True)
    ok = all(outcome.problem is None for outcome in outcomes.values())
    print(json.dumps(_summary(ok, outcomes) | {"seconds": round(time.monotonic() - begin_s, 1)}))
    return 0 if ok else 1


def _summary(ok: bool, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    return {
        "ok": ok,
        "figures": {
            name: outcome.figures
            for name, outcome in outcomes.items()
            if outcome.figures is not None
        },
        "skipped": {name: outcome.skipped for name, outcome in outcomes.items() if outcome.skipped},
        "problems": {
            name: outcome.problem for name, outcome in outcomes.items() if outcome.problem
        },
    }


if __name__ == "__main__":
    sys.exit(main())
