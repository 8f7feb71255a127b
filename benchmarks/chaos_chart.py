"""A chaos run as a picture: requests under way and live replicas over time, with the faults.

Owns its looks. Never judges.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.chaos_client import Outcome
from benchmarks.chaos_verdict import Record
from kvtransfer.phase import PHASES

_COLOURS = {"prefill": "#1f6feb", "decode": "#bf5700"}
_INK, _FAINT, _FAULT = "#24292f", "#b6bec9", "#cf222e"


def write_chart(record: Record, path: Path) -> None:
    """Writes a PNG."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    times_s, numbers = under_way(record.outcomes)
    above.step(
        [at_s - record.start_s for at_s in times_s], numbers, where="post", color=_INK, linewidth=1
    )
    above.set_ylabel("requests under way", color=_INK)
    above.set_ylim(bottom=0)
    for pool in PHASES:
        below.step(
            [sample.at_s - record.start_s for sample in record.samples],
            [sample.seen.num_live[pool] for sample in record.samples],
            where="post",
            color=_COLOURS[pool],
            label=pool,
        )
    below.set_ylabel("live replicas", color=_INK)
    below.set_ylim(0, 2.3)
    below.set_xlabel("seconds", color=_INK)
    below.legend(loc="lower right", fontsize=8, frameon=False)
    for fault in record.faults:
        at_s = fault.at_s - record.start_s
        for axis in (above, below):
            axis.axvline(at_s, color=_FAULT, linewidth=0.8, alpha=0.7)
        name = f"{fault.kind.value} {fault.pool or ''}"
        above.text(
            at_s,
            1.0,
            f" {name}",
            transform=above.get_xaxis_transform(),
            rotation=90,
            va="top",
            fontsize=7,
            color=_FAULT,
        )
    for axis in (above, below):
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axis.spines[side].set_color(_FAINT)
    figure.savefig(path, dpi=120)


def under_way(outcomes: Sequence[Outcome]) -> tuple[list[float], list[int]]:
    """How many requests were under way from each moment at which that changed."""
    changes = sorted(
        [(outcome.start_s, 1) for outcome in outcomes]
        + [(outcome.end_s, -1) for outcome in outcomes]
    )
    times_s, numbers, number = [], [], 0
    for at_s, change in changes:
        number += change
        times_s.append(at_s)
        numbers.append(number)
    return times_s, numbers
