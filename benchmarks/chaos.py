"""The chaos run: a cluster of two and two under load, a fault every few seconds, a verdict.

Owns the command line and the cluster's beginning and end. `python -m benchmarks.chaos --help` is
the command; its exit status and the last line of its output are the result.
"""

import argparse
import asyncio
import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import yaml

from benchmarks import chaos_report
from benchmarks.chaos_chart import write_chart
from benchmarks.chaos_faults import Kind
from benchmarks.chaos_node import Node, node_for
from benchmarks.chaos_pace import Pressure
from benchmarks.chaos_processes import end
from benchmarks.chaos_run import ChaosError, ChaosRun, RunOptions
from benchmarks.chaos_verdict import Record, judge
from benchmarks.load import real_time_priority
from benchmarks.machine import observe_machine
from benchmarks.systems import SystemFailedError, adopt_orphans, launch_pdserve, started
from kvtransfer.phase import PHASES

_FOLDER = Path(__file__).resolve().parent
_START_S = time.monotonic()


def say(text: str) -> None:
    """Prints a line of progress, with the minutes and seconds since the start."""
    minutes, seconds = divmod(int(time.monotonic() - _START_S), 60)
    print(f"{minutes:3d}:{seconds:02d}  {text}", flush=True)


def run(node: Node, options: RunOptions) -> Record:
    """Starts the cluster, runs, ends it, and looks for what is left.

    Raises:
        ChaosError: the cluster did not start, or answers differently without any fault.
        SystemFailedError: the cluster's own process ended.
    """
    say("starting the cluster")
    with started(node.launcher(launch_pdserve), options.config) as system:
        with real_time_priority():
            record = asyncio.run(ChaosRun(system, node, options, say).run())
        say("ending the cluster")
        return dataclasses.replace(record, left=tuple(end(system.process)))


def main() -> int:
    """The command line."""
    options = _parser().parse_args()
    run_options = RunOptions(
        least_s=options.minutes * 60,
        pressure=Pressure(
            load=options.load, fault_every=options.fault_every, patience=options.patience
        ),
        burst=options.burst,
        seed=options.seed,
        kinds=tuple(Kind(name) for name in options.faults),
        spare_last=options.spare_last,
        num_replicas={pool: num_replicas(options.config, pool) for pool in PHASES},
        num_routers=num_replicas(options.config, "router"),
        poisons=not options.no_poison,
        config=options.config,
    )
    adopt_orphans()
    try:
        with node_for(run_options.kinds, options.config) as node:
            run_options = _without(node.lacking, run_options)
            record = run(node, run_options)
    except (ChaosError, SystemFailedError) as failure:
        print(f"no result: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: what was started has been stopped", file=sys.stderr)
        return 130
    verdict = judge(record)
    chaos_report.write(options.out, record, verdict, options=run_options, machine=observe_machine())
    write_chart(record, options.out.with_suffix(".png"))
    say(f"written to {options.out}")
    print(f"\n{chaos_report.summary_table(record, verdict)}\n")
    for reason in verdict.reasons:
        print(f"it did not hold: {reason}")
    for error, num in verdict.failures.items():
        print(f"{num} failed with: {error}")
    print(json.dumps(verdict.summary()))
    return 1 if verdict.reasons else 0


def _without(lacking: Mapping[Kind, str], options: RunOptions) -> RunOptions:
    for kind, why in lacking.items():
        say(f"without {kind.value}: {why}")
    kinds = tuple(kind for kind in options.kinds if kind not in lacking)
    return dataclasses.replace(options, kinds=kinds, left_out=lacking)


def num_replicas(config: Path, deployment: str) -> int:
    """How many of a deployment a config has."""
    # Read as it stands: `pdserve up` is about to check it, and says what is wrong with it.
    (application,) = yaml.safe_load(config.read_text())["applications"]
    return int(application["args"].get(deployment, {}).get("replicas", 1))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos",
        description="Puts load on two prefill and two decode replicas while a fault comes every"
        " few seconds, and compares every answer with the undisturbed one. The last line is JSON;"
        " the exit status is 0 only if no request failed, no answer was wrong, nothing was held"
        " and no process left at the end. How fast requests come, how often faults, and how long"
        " clients wait follows the machine's speed, which is measured first. Starting, learning the"
        " answers, measuring and ending take about four minutes more than the run, on a slow"
        " machine eight.",
        epilog=f"Faults: {chaos_report.describe_kinds()}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--minutes",
        type=_positive,
        default=5.0,
        help="how long load is put on, at least; a slow machine takes longer for a few faults",
    )
    parser.add_argument(
        "--load",
        type=_positive,
        default=0.4,
        help="arrivals, in parts of the rate at which requests were answered while each pool was"
        " down to one replica and others started, which is measured first",
    )
    parser.add_argument(
        "--fault-every",
        type=_positive,
        default=0.6,
        help="from one fault to the next, in the time in which two engines start, measured first",
    )
    parser.add_argument(
        "--burst", type=int, default=4, help="requests more in the second before each fault"
    )
    parser.add_argument(
        "--faults",
        nargs="+",
        choices=[kind.value for kind in Kind],
        default=[kind.value for kind in Kind],
        help="which kinds; those for which this machine lacks something are left out, and the"
        " report says so",
    )
    parser.add_argument(
        "--spare-last",
        action="store_true",
        help="hit no replica that is the only live one of its pool; else requests have to wait",
    )
    parser.add_argument(
        "--no-poison",
        action="store_true",
        help="send no request at the end whose every engine is killed",
    )
    parser.add_argument(
        "--patience",
        type=_positive,
        default=5.0,
        help="how long a client waits for a whole answer, in the time in which two engines start",
    )
    parser.add_argument("--seed", type=int, default=0, help="of arrivals, requests and faults")
    parser.add_argument(
        "--config",
        type=Path,
        default=_FOLDER / "configs" / "chaos.yaml",
        help="the cluster; it must serve the demo model under its own name, in float32",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=_FOLDER / "results" / "chaos.md",
        help="the report; its chart goes beside it",
    )
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError("more than 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
