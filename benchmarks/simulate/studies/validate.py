"""Holds the simulator against measurements: DistServe's published ones and the live cluster's.

Owns the verdict. The live measurements are a file that `python -m benchmarks.simulate live` writes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from benchmarks.simulate.model.fleet import FleetSpec
from benchmarks.simulate.model.shared_cores import Contention
from benchmarks.simulate.studies import published
from benchmarks.simulate.studies.charts import draw_lines
from benchmarks.simulate.studies.live_record import (
    compare_loads,
    fit_spec,
    format_costs,
    format_points,
    read_record,
)
from benchmarks.simulate.studies.progress import with_progress
from benchmarks.simulate.studies.published import Knee, Point

_DISTSERVE_RATES = (1.5, 1.75, 2.0, 2.25, 2.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationReport:
    holds: bool
    text: str
    """Markdown."""


def validate(out: Path, *, live: Path) -> ValidationReport:
    """Simulates what was measured, writes `validate.md` and `validate.png` into `out`.

    What was not measured does not hold.

    Args:
        live: what the command `live` wrote; it need not be there.

    Raises:
        LiveRecordError: it is something else.
    """
    on_live = check_live(live)
    rates = list(published.VLLM_POINTS)
    runs = _run(rates)
    points = [
        Point(rate=rate, published=share, simulated=fmean(shares), deviation=stdev(shares))
        for (rate, share), shares in zip(published.VLLM_POINTS.items(), runs["vLLM"], strict=True)
    ]
    means = {system: [fmean(shares) for shares in found] for system, found in runs.items()}
    knees = [
        Knee(system=system, published=knee, simulated=published.find_knee(at, means[system]))
        for system, knee, at in (
            ("vLLM", published.VLLM_KNEE, rates),
            ("DistServe", published.DISTSERVE_KNEE, _DISTSERVE_RATES),
        )
    ]
    out.mkdir(parents=True, exist_ok=True)
    draw_lines(
        {
            "vLLM, published": (rates, list(published.VLLM_POINTS.values())),
            "vLLM, simulated": (rates, means["vLLM"]),
            "DistServe, simulated": (_DISTSERVE_RATES, means["DistServe"]),
        },
        title="OPT-13B, ShareGPT lengths: requests within both targets",
        x_label="requests per second per GPU",
        y_label="attainment",
        path=out / "validate.png",
    )
    holds = [*(each.holds for each in points), *(each.holds for each in knees), on_live.holds]
    report = ValidationReport(holds=all(holds), text=_format(points, knees) + on_live.text)
    (out / "validate.md").write_text(report.text)
    return report


def _run(vllm_rates: Sequence[float]) -> dict[str, list[list[float]]]:
    """Attainment by system, rate and run."""
    steps = [
        *(("vLLM", published.vllm_attainment, rate) for rate in vllm_rates),
        *(("DistServe", published.distserve_attainment, rate) for rate in _DISTSERVE_RATES),
    ]
    found: dict[str, list[list[float]]] = {"vLLM": [], "DistServe": []}
    for system, attain, rate in with_progress(steps, total=len(steps), what="runs"):
        found[system].append(attain(rate))
    return found


def _format(points: Sequence[Point], knees: Sequence[Knee]) -> str:
    lengths = [
        each
        for seed in range(published.NUM_RUNS)
        for each in published.make_workload(1.0, num_requests=published.REQUESTS_PER_GPU, seed=seed)
    ]
    prompt = fmean(each.prompt_tokens for each in lengths)
    answer = fmean(each.output_tokens for each in lengths)
    lines = [
        "# The simulator against measurements",
        "",
        "## DistServe, Fig. 8 (OPT-13B, ShareGPT, TTFT 0.25 s, TPOT 0.1 s)",
        "",
        f"A published point is one run of {published.REQUESTS_PER_GPU} requests a GPU. Its Poisson"
        f" arrivals come from numpy's generator with seed {published.ARRIVALS_SEED}, and are the"
        " same here: every rate has the same bursts in the same places. The lengths of the requests"
        f" are not public; simulated are means of {published.NUM_RUNS} runs with lengths of their"
        " own.",
        "",
        f"Lengths: prompts normal ({published.PROMPTS.mean:g}, {published.PROMPTS.sigma:g}),"
        f" answers lognormal (mean {published.ANSWERS.mean:g}, sigma {published.ANSWERS.sigma:g}),"
        f" drawn again where they do not fit {published.CONTEXT_TOKENS} tokens together; that is on"
        f" average {prompt:.0f} and {answer:.0f} tokens (published: 755 and 200).",
        "",
        "Fitted to vLLM's points and knee: the two numbers of the prompts. Chosen with the points"
        " in view: the answers' sigma, and both families of distributions (a lognormal of prompts"
        " does about as well). The answers' mean follows from the published one. Nothing else:"
        " arrivals, costs, KV, limits of batches, padding, the targets, and DistServe's one prefill"
        " engine on two GPUs and one decode engine on one are as published.",
        "",
        "| vLLM, requests/s per GPU | published | simulated | one run deviates by |"
        " within 3 points |",
        "|---|---|---|---|---|",
        *(
            f"| {each.rate:g} | {each.published:.0%} | {each.simulated:.1%} |"
            f" {100 * each.deviation:.1f} points | {_verdict(each.holds)} |"
            for each in points
        ),
        "",
        "| knee at 90 % | published | simulated | within 20 % |",
        "|---|---|---|---|",
        *(
            f"| {each.system} | {each.published:.2f} | {each.simulated:.2f} |"
            f" {_verdict(each.holds)} |"
            for each in knees
        ),
    ]
    return "\n".join(lines) + "\n"


def check_live(path: Path) -> ValidationReport:
    """The part about the live cluster, from what `live` wrote; without that it does not hold.

    Raises:
        LiveRecordError: the file is something else.
    """
    title = "\n## The live cluster: one prefill and one decode engine of the demo model\n\n"
    if not path.exists():
        text = f"{title}Not measured: `python -m benchmarks.simulate live` does it.\n"
        return ValidationReport(holds=False, text=text)
    record = read_record(path)
    points, spec = compare_loads(record), fit_spec(record)
    lines = (
        record.machine,
        "",
        "The requests of each load, as they came, were simulated. Nothing was fitted to them."
        " Before them, the router had fitted engine steps on the same cores"
        f" ({format_costs(record)});"
        " from one request at a time come"
        f" {1e3 * spec.edge_s:.1f} ms to and from prefill, {1e3 * spec.handover_s:.1f} ms of"
        f" handover and {1e3 * spec.prefill.overhead_s:.2f} ms beside each step; from"
        f" {_listed(each.num_answers for each in record.besides)} answers at once, what each adds"
        " to a step. Engines, router and clients contend for the cores: prompts read beside such"
        f" answers took {_contention(spec).prefill:.2f} times as long as alone, and the answers'"
        f" steps {_contention(spec).decode:.2f} times. So does each phase in the simulation while"
        " the other pool's engine is busy.",
        "",
        format_points(points),
        "",
    )
    return ValidationReport(holds=all(each.holds for each in points), text=title + "\n".join(lines))


def _listed(numbers: Iterable[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


def _contention(spec: FleetSpec) -> Contention:
    assert spec.contention is not None, "it was measured"
    return spec.contention


def _verdict(holds: bool) -> str:
    return "yes" if holds else "no"
