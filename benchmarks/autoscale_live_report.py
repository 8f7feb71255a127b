"""What a live autoscaling run's report looks like: Markdown and a picture.

Never measures, never judges.
"""

import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.autoscale_live_record import LoadPhaseRecord, Record
from benchmarks.chaos_chart import under_way
from benchmarks.chaos_client import Outcome
from benchmarks.load import percentile
from benchmarks.machine import Machine
from kvtransfer.phase import PHASES

_COLOURS = {"prefill": "#1f6feb", "decode": "#bf5700"}
_INK, _FAINT, _TARGET = "#24292f", "#d0d7de", "#cf222e"


def write(
    path: Path, record: Record, reasons: Sequence[str], *, config: Path, machine: Machine
) -> None:
    """Writes the report to `path` and the chart beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    args = yaml.safe_load(config.read_text())["applications"][0]["args"]
    slo = args["slo"]
    held = "**It held.**" if not reasons else "**It did not hold:**"
    sections = [
        "# Autoscaling, live\n\nWritten by `python -m benchmarks.autoscale_live`; do not edit.",
        "\n".join([held, "", *(f"- {reason}" for reason in reasons)]).rstrip(),
        phase_table(record),
        f"![Load, replicas, TTFT and ITL with their targets]({path.stem}.png)",
        f"## How it was measured\n\n{_method(record)}",
        f"## The config\n\n```yaml\n{yaml.safe_dump(args, sort_keys=False)}```",
        f"## Machine\n\n{machine.markdown()}",
    ]
    path.write_text("\n\n".join(sections) + "\n")
    _write_chart(record, path.with_suffix(".png"), ttft_s=slo["ttft_s"], itl_s=slo["itl_s"])


def phase_table(record: Record) -> str:
    """One line for each phase, for the terminal too."""
    head = (
        "phase", "load", "seconds", "requests", "failed", "prefill replicas", "decode replicas",
        "TTFT p50 / p90, ms", "mean ITL p50 / p90, ms",
    )  # fmt: skip
    rows = [head, *(_row(record, each) for each in record.phases)]
    first, *others = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([first, "|---" * len(head) + "|", *others])


def ttft_s(outcome: Outcome) -> float | None:
    """Of a request that was answered."""
    arrivals_s = outcome.arrivals_s[0]
    return None if outcome.error or not arrivals_s else arrivals_s[0] - outcome.start_s


def itl_s(outcome: Outcome) -> float | None:
    """The mean of a request, None for an answer that came in one piece."""
    arrivals_s = outcome.arrivals_s[0]
    if outcome.error or len(arrivals_s) < 2:
        return None
    return (arrivals_s[-1] - arrivals_s[0]) / (len(arrivals_s) - 1)


def _row(record: Record, each: LoadPhaseRecord) -> tuple[str, ...]:
    outcomes, samples = record.of(each.phase), record.during(each)
    ttfts = [value for outcome in outcomes if (value := ttft_s(outcome)) is not None]
    itls = [value for outcome in outcomes if (value := itl_s(outcome)) is not None]
    replicas = []
    for pool in PHASES:
        sizes = [sample.num_live[pool] for sample in samples]
        steps = sizes[:1] + [after for before, after in pairwise(sizes) if after != before]
        replicas.append(" → ".join(map(str, steps)))
    return (
        each.phase.name,
        each.phase.describe(),
        f"{each.end_s - each.start_s:.0f}",
        str(len(outcomes)),
        str(sum(outcome.error is not None for outcome in outcomes)),
        *replicas,
        _percentiles(ttfts),
        _percentiles(itls),
    )


def _percentiles(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return " / ".join(f"{percentile(values, share) * 1000:.1f}" for share in (0.5, 0.9))


def _method(record: Record) -> str:
    text = (
        "A cluster of one prefill and one decode replica of the demo model, two of each at most,"
        " was given five phases of load: Poisson arrivals, open loop, random prompts with a cache"
        " salt each. The loads follow what one replica did by itself at the start: a long prompt in"
        f" {record.speed.prompt_s * 1e3:.0f} ms, and as many answers as decode writes at once with"
        f" a token every {record.speed.token_s * 1e3:.1f} ms. A calm phase lasts until each pool is"
        " back to one replica. It holds if in the phase of long prompts prefill has two replicas"
        " and decode never, in the phase of long answers decode has two and prefill never, both are"
        " back to one at the end of each calm phase, no request failed and no process was left."
        " Replicas are those that the router may send requests to, looked at every second. TTFT"
        " runs from the request sent to the first token received; a request's ITL is the mean over"
        " its tokens."
    )
    return textwrap.fill(text, 100)


def _write_chart(record: Record, path: Path, *, ttft_s: float, itl_s: float) -> None:
    figure = Figure(figsize=(12, 9), layout="constrained")
    load, replicas, first, between = figure.subplots(4, 1, sharex=True, height_ratios=(2, 1, 2, 2))
    times_s, numbers = under_way(record.outcomes)
    load.step([at_s - record.start_s for at_s in times_s], numbers, where="post", color=_INK)
    load.set_ylabel("requests under way")
    for pool in PHASES:
        replicas.step(
            [sample.at_s - record.start_s for sample in record.samples],
            [sample.num_live[pool] for sample in record.samples],
            where="post",
            color=_COLOURS[pool],
            label=pool,
        )
    replicas.set_ylabel("replicas")
    replicas.set_ylim(0, 2.3)
    replicas.legend(loc="upper right", fontsize=8, frameon=False)
    _scatter(first, record, "TTFT, s", _COLOURS["prefill"], target=ttft_s, of="ttft")
    _scatter(between, record, "mean ITL, s", _COLOURS["decode"], target=itl_s, of="itl")
    between.set_xlabel("seconds")
    for axis in (load, replicas, first, between):
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        for each in record.phases:
            axis.axvline(each.start_s - record.start_s, color=_FAINT, linewidth=0.8)
    for each in record.phases:
        load.text(
            each.start_s - record.start_s,
            1.0,
            f" {each.phase.name}",
            transform=load.get_xaxis_transform(),
            va="bottom",
            fontsize=8,
            color=_INK,
        )
    figure.savefig(path, dpi=110)


def _scatter(
    axis: Axes, record: Record, label: str, colour: str, *, target: float, of: str
) -> None:
    measure = ttft_s if of == "ttft" else itl_s
    points = [
        (outcome.start_s - record.start_s, value)
        for outcome in record.outcomes
        if (value := measure(outcome)) is not None
    ]
    axis.scatter([x for x, _ in points], [y for _, y in points], s=6, color=colour)
    axis.axhline(target, color=_TARGET, linewidth=1, label=f"target {target:g} s")
    axis.set_ylabel(label)
    axis.set_ylim(bottom=0)
    axis.legend(loc="upper right", fontsize=8, frameon=False)
