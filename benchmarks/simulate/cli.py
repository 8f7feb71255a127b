"""The command line: `python -m benchmarks.simulate COMMAND --help`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.simulate.model.profiles import LLAMA_8B_H100, PROFILES
from benchmarks.simulate.studies.compare import (
    CompareOptions,
    compare,
    format_tables,
)
from benchmarks.simulate.studies.internet_scale import format_scale, measure_scale
from benchmarks.simulate.studies.live import CONFIG, DURATION_S, measure_live
from benchmarks.simulate.studies.live_record import (
    LiveRecordError,
    compare_loads,
    format_points,
    write_record,
)
from benchmarks.simulate.studies.routing import format_study, study_routing
from benchmarks.simulate.studies.sizing import WorkloadTooLargeError, format_plan, plan_fleet
from benchmarks.simulate.studies.step_load import format_step_load, measure_step_load
from benchmarks.simulate.studies.validate import validate
from benchmarks.simulate.workloads.scenarios import SCENARIOS
from benchmarks.simulate.workloads.traces import TraceError, multiply, read_trace
from benchmarks.systems import SystemFailedError
from router.slo import Slo

if TYPE_CHECKING:
    # Generic for type checkers only.
    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]

RESULTS = Path(__file__).parent.parent / "results" / "simulate"
LIVE = RESULTS / "live.json"


def parse_slo(text: str) -> Slo:
    """Reads `ttft=0.5,itl=0.05`, in seconds.

    Raises:
        argparse.ArgumentTypeError: it is something else, or a target is not above 0.
    """
    try:
        parts = dict(part.split("=") for part in text.split(","))
        slo = Slo(ttft_s=float(parts.pop("ttft")), itl_s=float(parts.pop("itl")))
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is not like ttft=0.5,itl=0.05") from None
    if parts or slo.ttft_s <= 0 or slo.itl_s <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: only ttft and itl, both above 0")
    return slo


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
    except (TraceError, OSError, WorkloadTooLargeError, LiveRecordError) as error:
        print(f"python -m benchmarks.simulate: {error}", file=sys.stderr)
        return 2
    return status


def _validate(options: argparse.Namespace) -> int:
    report = validate(options.out, live=options.live)
    print(report.text, end="")
    return 0 if report.holds else 1


def _live(options: argparse.Namespace) -> int:
    try:
        record = measure_live(
            config=options.config,
            duration_s=options.duration,
            seed=options.seed,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except SystemFailedError as failure:
        print(f"no measurement: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: what was started has been stopped", file=sys.stderr)
        return 130
    write_record(record, options.out)
    print(format_points(compare_loads(record)))
    print(f"written to {options.out}", file=sys.stderr)
    return 0


def _compare(options: argparse.Namespace) -> int:
    settings = _compare_options(options)
    sources = [*options.trace, *([] if options.no_scenarios else SCENARIOS)]
    comparisons = compare(sources, settings, options.out, num_processes=options.processes)
    print(format_tables(comparisons, settings), end="")
    print(f"written to {options.out}", file=sys.stderr)
    return 0


def _compare_options(options: argparse.Namespace) -> CompareOptions:
    return CompareOptions(
        profile=PROFILES[options.profile],
        slo=options.slo,
        gpu_budget=options.gpu_budget,
        mean_gpus=options.mean_gpus,
        max_requests=options.max_requests,
        seed=options.seed,
    )


def _plan(options: argparse.Namespace) -> int:
    for path in options.trace:
        workload = multiply(read_trace(Path(path)), options.factor, seed=options.seed)
        plans = plan_fleet(
            workload,
            options.slo,
            [PROFILES[name] for name in options.profile or [LLAMA_8B_H100.name]],
            share=options.percentile / 100,
            gpu_hour_price=options.gpu_hour_price,
        )
        name = Path(path).stem
        print(format_plan(name, plans, options.slo, options.out / f"plan-{name}.png"), end="")
    return 0


def _routers(options: argparse.Namespace) -> int:
    rows = study_routing(num_requests=options.requests, seed=options.seed)
    print(format_study(rows), end="")
    return 0


def _step_load(options: argparse.Namespace) -> int:
    print(format_step_load(measure_step_load(_compare_options(options))), end="")
    return 0


def _scale(options: argparse.Namespace) -> int:
    report = measure_scale(
        num_replicas=options.replicas, num_routers=options.routers, seconds=options.seconds
    )
    print(format_scale(report), end="")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulate",
        description="Simulates clusters with the production policies, faster than real time.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_validate(commands)
    _add_live(commands)
    _add_compare(commands)
    _add_step_load(commands)
    _add_plan(commands)
    _add_routers(commands)
    _add_scale(commands)
    return parser


def _add_validate(commands: "_Commands") -> None:
    validating = _command(
        commands, "validate", "holds the simulator against measurements; status 1 if one is off"
    )
    validating.add_argument("--out", type=Path, default=RESULTS, help="folder for report and plot")
    validating.add_argument(
        "--live", type=Path, default=LIVE, help="what `live` wrote, predicted from its costs"
    )
    validating.set_defaults(run=_validate)


def _add_live(commands: "_Commands") -> None:
    measuring = _command(
        commands,
        "live",
        "starts the two-core cluster and measures it at three loads, for `validate`; takes some"
        " minutes, in which the machine should do nothing else",
    )
    measuring.add_argument("--config", type=Path, default=CONFIG, help="the cluster's file")
    measuring.add_argument("--duration", type=float, default=DURATION_S, help="seconds of a load")
    measuring.add_argument("--out", type=Path, default=LIVE, help="the file to write")
    measuring.add_argument("--seed", type=int, default=1, help="of arrivals and prompts")
    measuring.set_defaults(run=_live)


def _add_compare(commands: "_Commands") -> None:
    comparing = _command(commands, "compare", "compares autoscalers on traces and scenarios")
    comparing.add_argument(
        "--trace",
        action="append",
        default=[],
        metavar="FILE",
        help="CSV (TIMESTAMP, ContextTokens, GeneratedTokens) or JSON lines (timestamp in ms,"
        " input_length, output_length); may be given again",
    )
    comparing.add_argument("--out", type=Path, default=RESULTS, help="folder for tables and plots")
    comparing.add_argument("--no-scenarios", action="store_true", help="leave synthetic ones out")
    comparing.add_argument("--processes", type=int, default=2, help="simulations at once")
    _add_compare_options(comparing)
    comparing.set_defaults(run=_compare)


def _add_step_load(commands: "_Commands") -> None:
    rising = _command(
        commands,
        "step-load",
        "what a rise that nobody announces costs without foresight; some minutes",
        aliases=("rise",),
    )
    _add_compare_options(rising)
    rising.set_defaults(run=_step_load)


def _add_compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile", choices=sorted(PROFILES), default=LLAMA_8B_H100.name, help="both pools' engine"
    )
    _add_slo(parser, "a TTFT that no idle engine can keep is raised to what one can")
    parser.add_argument("--gpu-budget", type=int, default=64, help="of both pools together")
    parser.add_argument(
        "--mean-gpus", type=float, default=8.0, help="GPUs that a workload is scaled to keep busy"
    )
    parser.add_argument(
        "--max-requests", type=int, default=120_000, help="a larger workload ends after as many"
    )
    parser.add_argument("--seed", type=int, default=1, help="of arrivals and routers")


def _add_plan(commands: "_Commands") -> None:
    planning = _command(commands, "plan", "how many replicas a workload needs, and their price")
    planning.add_argument(
        "--trace", action="append", required=True, metavar="FILE", help="as above"
    )
    _add_slo(planning, "held by --percentile of the requests")
    planning.add_argument("--percentile", type=float, default=90.0, help="of requests, each target")
    planning.add_argument("--factor", type=float, default=1.0, help="multiplies the trace's rate")
    planning.add_argument(
        "--profile",
        action="append",
        choices=sorted(PROFILES),
        default=None,
        help=f"an engine to plan with ({LLAMA_8B_H100.name}); may be given again",
    )
    planning.add_argument("--gpu-hour-price", type=float, default=2.5, help="in dollars")
    planning.add_argument("--out", type=Path, default=Path(), help="folder for the plots")
    planning.add_argument("--seed", type=int, default=1, help="of arrivals and routers")
    planning.set_defaults(run=_plan)


def _add_routers(commands: "_Commands") -> None:
    studying = _command(commands, "routers", "1, 4 and 16 routers that know little of each other")
    studying.add_argument("--requests", type=int, default=20_000, help="in each run")
    studying.add_argument("--seed", type=int, default=1, help="of arrivals and routers")
    studying.set_defaults(run=_routers)


def _add_scale(commands: "_Commands") -> None:
    scaling = _command(commands, "scale", "measures a router's work among a thousand replicas")
    scaling.add_argument("--replicas", type=int, default=1000, help="of both pools")
    scaling.add_argument("--routers", type=int, default=64, help="that share the traffic")
    scaling.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    scaling.set_defaults(run=_scale)


def _add_slo(parser: argparse.ArgumentParser, note: str) -> None:
    parser.add_argument(
        "--slo",
        type=parse_slo,
        default=Slo(ttft_s=0.5, itl_s=0.05),
        metavar="ttft=S,itl=S",
        help=f"targets in seconds (ttft=0.5,itl=0.05); {note}",
    )


def _command(
    commands: "_Commands", name: str, text: str, *, aliases: Sequence[str] = ()
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        aliases=aliases,
        help=text,
        description=text,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
