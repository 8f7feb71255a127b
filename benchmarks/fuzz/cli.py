"""The fuzz run's command line, and the cluster's beginning and end.

`python -m benchmarks.fuzz --help` is the command; its exit status and the last line of its output
are the result.
"""

import argparse
import asyncio
import dataclasses
import json
import sys
import time
from pathlib import Path

from benchmarks.chaos import num_replicas
from benchmarks.chaos_processes import end
from benchmarks.fuzz import report
from benchmarks.fuzz.good import NotRightError
from benchmarks.fuzz.mix import Mix
from benchmarks.fuzz.run import FuzzError, FuzzRun, RunOptions
from benchmarks.fuzz.shots import Kind
from benchmarks.fuzz.verdict import Record, Verdict, judge
from benchmarks.machine import observe_machine
from benchmarks.systems import SystemFailedError, adopt_orphans, launch_pdserve, started
from cluster.serve_file import load_serve_file
from kvtransfer.phase import PHASES

_FOLDER = Path(__file__).resolve().parent.parent
_START_S = time.monotonic()
_EXAMPLES = """\
examples:
  python -m benchmarks.fuzz --minutes 2                    two minutes, seed 0
  python -m benchmarks.fuzz --minutes 10 --seed 7          another sequence
  python -m benchmarks.fuzz --seed 7 --only 123 456        these two of it again, one by one
  python -m benchmarks.fuzz --kinds deadly headers         these kinds, and good requests
"""


def say(text: str) -> None:
    """Prints a line of progress, with the minutes and seconds since the start."""
    minutes, seconds = divmod(int(time.monotonic() - _START_S), 60)
    print(f"{minutes:3d}:{seconds:02d}  {text}", flush=True)


def main() -> int:
    """The command line."""
    options = _parser().parse_args()
    run_options = RunOptions(
        seconds=options.minutes * 60,
        seed=options.seed,
        num_at_once=options.at_once,
        kinds=tuple(Kind[name.upper()] for name in options.kinds),
        only=tuple(options.only),
        num_replicas={pool: num_replicas(options.config, pool) for pool in PHASES},
        num_routers=num_replicas(options.config, "router"),
        slo=load_serve_file(options.config).config.slo,
    )
    adopt_orphans()
    try:
        record, mix = run(options.config, run_options)
    except (FuzzError, NotRightError, SystemFailedError) as failure:
        print(f"no result: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: what was started has been stopped", file=sys.stderr)
        return 130
    verdict = judge(record)
    _write(options, record, verdict, mix)
    print(json.dumps(verdict.summary()))
    holds = verdict.holds_at_any_speed if options.any_speed else verdict.holds
    return 0 if holds else 1


def run(config: Path, options: RunOptions) -> tuple[Record, Mix]:
    """Starts the cluster, runs, ends it, and looks for what is left.

    Raises:
        FuzzError: the cluster did not start.
        NotRightError: it answers wrongly without anything else.
        SystemFailedError: the cluster's own process ended.
    """
    say(f"starting the cluster; the seed is {options.seed}")
    with started(launch_pdserve, config) as system:
        fuzz = FuzzRun(system, options, say)
        record = asyncio.run(fuzz.run())
        say("ending the cluster")
        return dataclasses.replace(record, left=tuple(end(system.process))), fuzz.mix


def _write(options: argparse.Namespace, record: Record, verdict: Verdict, mix: Mix) -> None:
    text = report.report(record, verdict, machine=observe_machine(), minutes=options.minutes)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text)
    report.write_findings(options.findings, record, verdict, mix)
    say(f"written to {options.out}; findings, whole, to {options.findings}")
    print(f"\n{report.summary_table(record, verdict)}\n")
    for finding, count in report.grouped(verdict):
        times = f" ({count} times)" if count > 1 else ""
        print(f"seed {verdict.seed}: {finding.symptom.value}: {finding.what}{times}")
        print(report.shown(finding, mix))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzz",
        description="Sends a live cluster whatever a client or a neighbour may send, next to good"
        " requests, whose answers are compared with those they have alone. The last line is JSON;"
        " the exit status is 0 only if there was no status 500, no well-formed request without an"
        " answer, no process ended, no good answer wrong, or slower than ten times its median alone"
        " and than the cluster's targets allow, and nothing held after each hundred requests."
        " Starting and ending take about two minutes more than the run, on a slow machine four.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=_positive, default=2.0, help="how long; default 2")
    parser.add_argument("--seed", type=int, default=0, help="of what is sent; default 0")
    parser.add_argument(
        "--any-speed",
        action="store_true",
        help="slow answers are told and do not fail the run: on few cores whatever computes much"
        " slows the others down",
    )
    parser.add_argument("--at-once", type=int, default=4, help="requests at a time; default 4")
    parser.add_argument(
        "--only", type=int, nargs="+", default=[], help="these numbers of the sequence, one by one"
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=[kind.name.lower() for kind in Kind],
        default=[kind.name.lower() for kind in Kind],
        metavar="KIND",
        help=f"which, of {', '.join(kind.name.lower() for kind in Kind)}; another choice is another"
        " sequence",
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=_FOLDER / "configs" / "chaos.yaml",
        help="the cluster; it must serve the demo model under its own name, in float32",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=_FOLDER / "results" / "fuzz.md",
        help="the report; default benchmarks/results/fuzz.md",
    )
    parser.add_argument(
        "--findings",
        type=Path,
        default=Path("build", "fuzz"),
        help="the folder for what was found, emptied first; default build/fuzz",
    )
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError("more than 0")
    return value
