"""Holds the simulator against measurements: DistServe's published ones and the live cluster's.

Owns the verdict. The live measurements are a file that `python -m benchmarks.simulate live` writes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from benchmarks.simulate import published
from benchmarks.simulate.charts import draw_lines
from benchmarks.simulate.live_record import (
    compare_loads,
    fit_spec,
    format_costs,
    format_points,
    read_record,
)
from benchmarks.simulate.progress import with_progress
from benchmarks.simulate.published import Knee, Point

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
    workload = published.make_workload(1.0, num_requests=published.NUM_REQUESTS, seed=0)
    prompt = sum(each.prompt_tokens for each in workload) / len(workload)
    answer = sum(each.output_tokens for each in workload) / len(workload)
    lines = [
        "# The simulator against measurements",
        "",
        "## DistServe, Fig. 8 (OPT-13B, ShareGPT, TTFT 0.25 s, TPOT 0.1 s, Poisson arrivals)",
        "",
        f"Lengths: prompts normal ({published.PROMPTS.mean:g}, {published.PROMPTS.sigma:g}),"
        f" answers lognormal (mean {published.ANSWERS.mean:g}, sigma {published.ANSWERS.sigma:g}),"
        f" drawn again where they do not fit {published.CONTEXT_TOKENS} tokens together; that is on"
        f" average {prompt:.0f} and {answer:.0f} tokens (published: 755 and 200)."
        f" {published.NUM_RUNS} runs of {published.NUM_REQUESTS} requests each, from an idle"
        " engine.",
        "",
        "Fitted to these points, as the lengths are not public: the two numbers of the prompts, and"
        " the mean of the answers. Chosen with the points in view: both families of distributions"
        " (lognormal prompts fit worse), the answers' sigma, the number of requests in a run, and"
        " DistServe's one prefill engine to two decode engines. Nothing else: costs, KV, batching"
        " and targets are as published.",
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
        "The published attainment falls by ten points from 1.5 to 2 requests/s and by one from"
        " there to 2.25: the simulated curve is smooth, and no rule of the engine gives it that"
        " step. Padding, the token budget of an iteration (2048 or 2560) and three quarters of the"
        " KV each move the point at 2 by less than a point; twice DistServe's overhead of an"
        " iteration moves it by 1.5, and others out of their range. TTFT alone decides there: TPOT,"
        " which leaves the first token out as DistServe's does, is met by nearly all.",
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
        f" handover and {1e3 * spec.prefill.overhead_s:.2f} ms beside each step. That prefill,"
        " decode, router and clients contend for the cores is in these costs as it was then; that"
        " they contend more under a higher load is not modelled.",
        "",
        format_points(points),
        "",
    )
    return ValidationReport(holds=all(each.holds for each in points), text=title + "\n".join(lines))


def _verdict(holds: bool) -> str:
    return "yes" if holds else "no"
