"""The comparison with bare vLLM and Ray Serve LLM: rounds, progress, verdict.

Owns the order of things and the command line. `python -m benchmarks.compare --help` is the command.
"""

import argparse
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from benchmarks import report
from benchmarks.chart import write_chart
from benchmarks.load import LoadError
from benchmarks.machine import observe_machine
from benchmarks.measure import Metrics, measure, wait_until_ready
from benchmarks.systems import (
    SYSTEMS,
    Launcher,
    SystemFailedError,
    adopt_orphans,
    launch_checkout,
    started,
)

_ROOT = Path(__file__).resolve().parent.parent
_RESULTS = _ROOT / "benchmarks" / "results"
_README = _ROOT / "README.md"
_START_S = time.monotonic()


def say(text: str) -> None:
    """Prints a line of progress, with the minutes and seconds since the start."""
    minutes, seconds = divmod(int(time.monotonic() - _START_S), 60)
    print(f"{minutes:3d}:{seconds:02d}  {text}", flush=True)


def take_turn(launcher: Launcher, config: Path, *, seed: int) -> Metrics:
    """Starts, measures and stops one system.

    Raises:
        SystemFailedError: it did not start, ended, or failed a request.
    """
    with started(launcher, config) as system:
        try:
            say(f"    ready after {wait_until_ready(system):.0f} s, warming up")
            return measure(system, seed=seed, report=lambda line: say(f"    {line}"))
        except (LoadError, OSError) as error:
            system.check_alive()
            raise SystemFailedError(f"{error}; the end of its log:\n{system.log_tail()}") from error


def compare(
    systems: Mapping[str, Launcher], config: Path, *, num_rounds: int
) -> dict[str, list[Metrics]]:
    """All rounds. The same round puts the same prompts on each system.

    Raises:
        SystemFailedError: one did not start, ended, or failed a request; the text names it.
    """
    rounds: dict[str, list[Metrics]] = {name: [] for name in systems}
    for index in range(num_rounds):
        for name, launcher in systems.items():
            say(f"round {index + 1} of {num_rounds}: {name}")
            try:
                rounds[name].append(take_turn(launcher, config, seed=index))
            except SystemFailedError as failure:
                raise SystemFailedError(f"{name}: {failure}") from failure
    return rounds


def write(rounds: dict[str, list[Metrics]], folder: Path) -> None:
    """The result files; with the default folder the README's table as well."""
    report.write(rounds, observe_machine(), folder)
    write_chart(rounds, folder / "compare.png")
    if folder == _RESULTS:
        _README.write_text(report.embed(_README.read_text(), report.summarise(rounds)))


def main() -> int:
    """The command line."""
    options = _parser().parse_args()
    systems = {name: SYSTEMS[name] for name in options.systems}
    if options.before:
        systems[report.BEFORE] = partial(launch_checkout, checkout=options.before.resolve())
    adopt_orphans()
    try:
        rounds = compare(systems, options.config, num_rounds=options.rounds)
    except SystemFailedError as failure:
        print(f"no comparison: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: what was started has been stopped", file=sys.stderr)
        return 130
    write(rounds, options.out)
    print(f"\n{report.median_table(rounds)}\n")
    if ratios := report.ratio_tables(rounds):
        print(f"{ratios}\n")
    say(f"written to {options.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description="Measures pdserve beside bare vLLM and Ray Serve LLM's prefill/decode app, one"
        " at a time on this machine, and writes compare.md, compare.json and compare.png."
        " Takes about seven minutes a round; use the machine for nothing else meanwhile.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=positive, default=3, help="turns of each system")
    parser.add_argument(
        "--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="which, in which order"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=_RESULTS,
        help="the folder for the results; the README's table follows the default one",
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=_ROOT / "benchmarks" / "configs" / "defaults.yaml",
        help="the file for pdserve, which must serve the demo model under its own name",
    )
    parser.add_argument(
        "--before",
        type=Path,
        metavar="CHECKOUT",
        help="another checkout of this project, to be measured as well: what has a change cost?",
    )
    return parser


def positive(text: str) -> int:
    """For argparse: a whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
