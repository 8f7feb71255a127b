"""Autoscalers side by side on the same workloads: who meets the targets, and at what cost.

Writes `compare.json` (rows), `foresight.json` (what can be had without knowing the future),
`compare.md` (tables), a picture per workload and one of attainment over cost. The simulations of a
workload run in processes of their own.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.simulate.autoscalers.baselines import Dynamo, HeteroScale, LlmD, RayServe
from benchmarks.simulate.autoscalers.foresight import (
    FLOORS,
    RESERVES,
    Reach,
    cheapest,
    measure_reach,
)
from benchmarks.simulate.autoscalers.oracle import find_schedule
from benchmarks.simulate.autoscalers.pdserve import PdserveAutoscaler
from benchmarks.simulate.model.causes import Causes
from benchmarks.simulate.model.fleet import FleetSpec
from benchmarks.simulate.model.profiles import EngineProfile
from benchmarks.simulate.model.requests import Arrival
from benchmarks.simulate.model.scaled_run import Autoscaler, Fixed, FleetSize, Outcome, run_scaled
from benchmarks.simulate.studies.charts import Tradeoff, draw_comparison, draw_reach
from benchmarks.simulate.studies.progress import with_progress
from benchmarks.simulate.workloads.demand import mean_gpus, mean_shape, reachable_slo
from benchmarks.simulate.workloads.scenarios import SCENARIOS, make_scenario
from benchmarks.simulate.workloads.traces import SPREAD_S, multiply, read_trace
from router.slo import Slo

PDSERVE, ORACLE = "pdserve", "oracle"
FIXED = "fixed-at-peak"
"""The oracle's largest pools, kept all the time: what never scaling costs."""
WARM_UP_S = 600.0
"""Of all runs: nobody is held to what the plans had no past for."""
GOAL_ATTAINMENT, GOAL_GPU_HOURS = 0.99, 1.15


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions:
    """What all runs of a comparison share."""

    profile: EngineProfile
    slo: Slo
    gpu_budget: int
    mean_gpus: float
    """That a workload is scaled to keep busy if nothing were ever idle."""
    max_requests: int
    """A workload of more ends after as many: it gets shorter, not smaller."""
    seed: int

    def spec(self, slo: Slo) -> FleetSpec:
        return FleetSpec(
            prefill=self.profile,
            decode=self.profile,
            edge_s=0.01,
            handover_s=0.002,
            ttft_s=slo.ttft_s,
            itl_s=slo.itl_s,
            seed=self.seed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One policy on one workload."""

    trace: str
    policy: str
    attainment: float
    """Of all requests: those that met both targets."""
    gpu_hours_vs_oracle: float
    num_scalings: int
    ttft_attainment: float
    itl_attainment: float
    gpu_hours: float
    num_requests: int
    ttft_target_s: float
    itl_target_s: float
    causes: Causes
    """Why requests missed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    name: str
    arrivals: tuple[Arrival, ...]
    slo: Slo
    measured_from_s: float
    """What comes before warms up."""


def _make(name: str, spec: FleetSpec, workload: Workload, budget: int) -> Autoscaler:
    slo, arrivals = workload.slo, workload.arrivals
    makers: dict[str, Callable[[], Autoscaler]] = {
        PDSERVE: lambda: PdserveAutoscaler(spec, slo, gpu_budget=budget),
        "ray-serve": RayServe,
        "llm-d": lambda: LlmD(slo),
        "dynamo": lambda: Dynamo(spec, slo),
        "heteroscale": lambda: HeteroScale(spec, slo, mean_shape(arrivals, spec.prefill)),
    }
    return makers[name]()


BASELINES = ("ray-serve", "llm-d", "dynamo", "heteroscale")


def load_workload(source: str, options: CompareOptions) -> Workload:
    """A trace's file or a scenario's name, scaled, with targets that can be met.

    Raises:
        TraceError, OSError: the file cannot be read.
    """
    profile, slo = options.profile, options.slo

    def factor_of(arrivals: Sequence[Arrival]) -> float:
        return options.mean_gpus / mean_gpus(arrivals, profile, profile, slo)

    if source in SCENARIOS:
        factor = factor_of(make_scenario(source, base_rate=1.0, seed=options.seed))
        arrivals = make_scenario(source, base_rate=factor, seed=options.seed)
        name = source
    else:
        trace = read_trace(Path(source))
        arrivals = multiply(trace, factor_of(trace), seed=options.seed)
        name = Path(source).stem
    arrivals = arrivals[: options.max_requests]
    return Workload(
        name=name,
        arrivals=tuple(arrivals),
        slo=reachable_slo(arrivals, profile, slo),
        measured_from_s=min(WARM_UP_S, arrivals[-1].arrival_s / 4),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All policies on one workload."""

    rows: tuple[Row, ...]
    outcomes: dict[str, Outcome]
    reached: tuple[Reach, ...]


def compare_workload(source: str, options: CompareOptions) -> Comparison:
    """Everyone starts with what the oracle starts with."""
    workload = load_workload(source, options)
    spec, budget = options.spec(workload.slo), options.gpu_budget
    schedule, oracle = find_schedule(
        spec,
        workload.arrivals,
        workload.slo,
        gpu_budget=budget,
        measured_from_s=workload.measured_from_s,
    )
    autoscalers: dict[str, Autoscaler] = {
        **{each: _make(each, spec, workload, budget) for each in (PDSERVE, *BASELINES)},
        FIXED: Fixed(FleetSize(max(schedule.prefill), max(schedule.decode))),
    }
    first = FleetSize(oracle.samples[0].num_prefill, oracle.samples[0].num_decode)
    outcomes = {ORACLE: oracle}
    for policy, autoscaler in autoscalers.items():
        outcomes[policy] = run_scaled(
            spec,
            workload.arrivals,
            autoscaler,
            workload.slo,
            first=first,
            gpu_budget=budget,
            measured_from_s=workload.measured_from_s,
        )
    reached = measure_reach(
        workload.name,
        spec,
        workload.arrivals,
        workload.slo,
        schedule,
        oracle_gpu_hours=oracle.gpu_hours,
        gpu_budget=budget,
        measured_from_s=workload.measured_from_s,
    )
    rows = tuple(
        _row(workload, policy, outcome, oracle_gpu_hours=oracle.gpu_hours)
        for policy, outcome in outcomes.items()
    )
    return Comparison(rows=rows, outcomes=outcomes, reached=tuple(reached))


def _row(workload: Workload, policy: str, outcome: Outcome, *, oracle_gpu_hours: float) -> Row:
    return Row(
        trace=workload.name,
        policy=policy,
        attainment=outcome.attainment,
        gpu_hours_vs_oracle=outcome.gpu_hours / oracle_gpu_hours,
        num_scalings=outcome.num_scalings,
        ttft_attainment=outcome.ttft_attainment,
        itl_attainment=outcome.itl_attainment,
        gpu_hours=outcome.gpu_hours,
        num_requests=outcome.num_requests,
        ttft_target_s=workload.slo.ttft_s,
        itl_target_s=workload.slo.itl_s,
        causes=outcome.causes,
    )


def compare(
    sources: Sequence[str], options: CompareOptions, out: Path, *, num_processes: int
) -> list[Comparison]:
    """Runs everything and writes `out`; returns the comparisons in the sources' order.

    Raises:
        TraceError, OSError: a trace cannot be read.
    """
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Comparison] = {}
    with ProcessPoolExecutor(num_processes) as executor:
        running = {executor.submit(compare_workload, each, options): each for each in sources}
        for future in with_progress(as_completed(running), total=len(running), what="workloads"):
            result = results[running[future]] = future.result()
            trace = result.rows[0].trace
            draw_comparison(trace, result.outcomes, out / f"compare-{trace}.png")
    ordered = [results[source] for source in sources]
    _write_json(out / "compare.json", [row for each in ordered for row in each.rows])
    _write_json(out / "foresight.json", [reach for each in ordered for reach in each.reached])
    draw_reach(_points(ordered), goal=(GOAL_ATTAINMENT, GOAL_GPU_HOURS), path=out / "foresight.png")
    (out / "compare.md").write_text(format_tables(ordered, options))
    return ordered


def _write_json(path: Path, rows: Sequence[Row | Reach]) -> None:
    path.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def _points(comparisons: Sequence[Comparison]) -> list[Tradeoff]:
    return [
        Tradeoff(
            trace=each.rows[0].trace,
            policies={row.policy: (row.gpu_hours_vs_oracle, row.attainment) for row in each.rows},
            without_foresight=_frontier(
                (reach.gpu_hours_vs_oracle, reach.attainment) for reach in each.reached
            ),
        )
        for each in comparisons
    ]


def _frontier(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of costs and shares, those that no cheaper one reaches."""
    best: list[tuple[float, float]] = []
    for cost, share in sorted(points):
        if not best or share > best[-1][1]:
            best.append((cost, share))
    return best


_CAUSES = {
    "too_long": "prompt too long",
    "ttft_starting": "TTFT: starting",
    "ttft_too_few": "TTFT: too few",
    "ttft_burst": "TTFT: burst",
    "ttft_imbalance": "TTFT: imbalance",
    "itl_kv": "ITL: KV cache",
    "itl_starting": "ITL: starting",
    "itl_too_few": "ITL: too few",
}
_LEGEND = """Why requests missed, as shares of all: the prompt takes an idle engine longer than the
target; replicas were on their way (starting); for half a minute more came than the replicas can
do and none was starting (too few); the same for seconds (burst); the pool had room but not the
replica that was chosen (imbalance); it was preempted (KV cache). A start takes as long as it
takes: what arrives before a rise can have been answered is missed by all that keep no reserve and
do not know the future."""
_NOTES = {"azure": "Arrivals: Azure Public Dataset, LLM inference traces (CC-BY-4.0)."}
"""Who must be named, by the start of a trace's name."""


def _format_causes(rows: Sequence[Row]) -> list[str]:
    """A table of why requests missed."""
    return [
        "",
        "| missed by | " + " | ".join(_CAUSES.values()) + " |",
        "|---|" + "---|" * len(_CAUSES),
        *(
            f"| {row.policy} | "
            + " | ".join(f"{getattr(row.causes, name):.2%}" for name in _CAUSES)
            + " |"
            for row in rows
        ),
    ]


_FORESIGHT = """Without foresight: the oracle's schedule, asked for when it is due and not a start
earlier, with a reserve of so many times that on top, and never less than a floor, as a part of
the most that it ever needs. It knows exactly and at once what is needed now, and nothing of what
comes: this is what starts cost by themselves, and what a reserve or a floor buys back. It bounds
no policy: a trend may announce a rise, and so may what came before. See `foresight.png`."""


def _format_reach(reached: Sequence[Reach]) -> list[str]:
    """A table of what each floor and reserve come to, and the cheapest that attains the goal."""
    cells = {(each.floor, each.reserve): each for each in reached}
    best = cheapest(reached)
    return [
        "",
        "| without foresight, floor | "
        + " | ".join(f"reserve {reserve:.0%}" for reserve in RESERVES)
        + " |",
        "|---|" + "---|" * len(RESERVES),
        *(
            f"| {floor:.0%} | "
            + " | ".join(_format_cell(cells.get((floor, reserve))) for reserve in RESERVES)
            + " |"
            for floor in FLOORS
        ),
        "",
        f"None of these attains {GOAL_ATTAINMENT:.0%}."
        if best is None
        else f"The cheapest of these that attains {GOAL_ATTAINMENT:.0%} costs"
        f" {best.gpu_hours_vs_oracle:.2f} times the oracle's GPU hours.",
    ]


def _format_cell(reach: Reach | None) -> str:
    """Empty where more would only cost more."""
    return f"{reach.attainment:.2%} at {reach.gpu_hours_vs_oracle:.2f}" if reach else ""


def format_tables(comparisons: Sequence[Comparison], options: CompareOptions) -> str:
    """The rows as Markdown, tables per workload, with what was asked of them."""
    lines = [
        "# Autoscalers compared in simulation",
        "",
        f"Engines: {options.profile.name} ({options.profile.source}), a start takes"
        f" {options.profile.start_s:g} s; at most {options.gpu_budget} GPUs."
        " GPU hours count from the decision to start a replica until it has drained."
        f" Goal: at least {GOAL_ATTAINMENT:.0%} of requests within both targets with at most"
        f" {GOAL_GPU_HOURS:g} times the oracle's GPU hours.",
        "",
        f"Every policy starts with the oracle's first sizes, warm; the first {WARM_UP_S:g} s, or a"
        " quarter of a shorter run, do not count. Traces are scaled by superposing copies of"
        f" themselves, each shifted as a whole by up to {SPREAD_S:g} s, to {options.mean_gpus:g}"
        " GPUs' worth of work if nothing were ever idle; a workload of over"
        f" {options.max_requests} requests ends after as many. The oracle knows the future and is"
        " found by trial: no proven optimum, so a ratio below 1 can happen. `fixed-at-peak` keeps"
        " the oracle's largest pools all the time.",
        "",
        _LEGEND,
        "",
        _FORESIGHT,
    ]
    for comparison in comparisons:
        first = comparison.rows[0]
        trace = first.trace
        notes = [note for start, note in _NOTES.items() if trace.lower().startswith(start)]
        lines += [
            "",
            f"## {trace}",
            "",
            *notes,
            f"{first.num_requests} requests; TTFT {first.ttft_target_s:g} s,"
            f" ITL {first.itl_target_s * 1e3:g} ms.",
            "",
            "| policy | both met | TTFT met | ITL met | GPU hours vs oracle | scalings |",
            "|---|---|---|---|---|---|",
            *(
                f"| {row.policy} | {row.attainment:.2%} | {row.ttft_attainment:.2%} |"
                f" {row.itl_attainment:.2%} | {row.gpu_hours_vs_oracle:.2f} |"
                f" {row.num_scalings} |"
                for row in comparison.rows
            ),
            *_format_causes(comparison.rows),
            *_format_reach(comparison.reached),
        ]
    return "\n".join(lines) + "\n"
