"""Pictures of simulated runs. Owns their looks; computes nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.simulate.model.scaled_run import Outcome

_INK, _FAINT_INK = "#24292f", "#6e7781"
_COLOURS = (
    "#6e7781",
    "#1f6feb",
    "#bf8700",
    "#cf222e",
    "#8250df",
    "#1a7f37",
    "#0a7ea4",
    "#b35900",
)


def draw_comparison(trace: str, outcomes: Mapping[str, Outcome], path: Path) -> None:
    """Writes a PNG: replicas over time per policy, above them what they came to."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    for colour, (policy, outcome) in zip(_COLOURS, outcomes.items(), strict=False):
        times = [sample.time_s / 60 for sample in outcome.samples]
        label = f"{policy}: {outcome.attainment:.1%}, {outcome.gpu_hours:.1f} GPU h"
        for axis, counts in (
            (axes[0], [sample.num_prefill for sample in outcome.samples]),
            (axes[1], [sample.num_decode for sample in outcome.samples]),
        ):
            axis.step(times, counts, where="post", color=colour, linewidth=1.2, label=label)
    _set_title(axes[0], f"{trace}: replicas of the prefill pool")
    _set_title(axes[1], "Replicas of the decode pool")
    axes[1].set_xlabel("minutes", color=_FAINT_INK)
    axes[0].legend(fontsize=8, frameon=False, ncols=3, loc="upper right")
    _save(figure, axes, path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tradeoff:
    """One workload's points: GPU hours by the oracle's, and attainment."""

    trace: str
    policies: Mapping[str, tuple[float, float]]
    without_foresight: Sequence[tuple[float, float]]
    """By reserve, from none on."""


def draw_reach(tradeoffs: Sequence[Tradeoff], *, goal: tuple[float, float], path: Path) -> None:
    """Writes a PNG: a panel per workload of attainment over cost, the goal shaded.

    Args:
        goal: the least attainment and the most GPU hours by the oracle's.
    """
    num_columns = min(3, len(tradeoffs))
    num_rows = ceil(len(tradeoffs) / num_columns)
    figure = Figure(figsize=(4 * num_columns, 3.2 * num_rows), layout="constrained")
    panels = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    for axis, tradeoff in zip(panels, tradeoffs, strict=False):
        axis.fill_between([0, goal[1]], goal[0], 1.0, color="#1a7f37", alpha=0.15, linewidth=0)
        costs, shares = zip(*tradeoff.without_foresight, strict=True)
        axis.plot(costs, shares, color=_INK, marker=".", linewidth=1, label="without foresight")
        for colour, (policy, (cost, share)) in zip(
            _COLOURS, tradeoff.policies.items(), strict=False
        ):
            axis.plot(cost, share, color=colour, marker="o", linestyle="", label=policy)
        axis.set_xlim(0.5, 3.0)
        axis.set_ylim(0.7, 1.005)
        _set_title(axis, tradeoff.trace)
    for axis in panels[len(tradeoffs) :]:
        axis.set_axis_off()
    panels[0].set_ylabel("both targets met", color=_FAINT_INK)
    panels[0].set_xlabel("GPU hours vs oracle", color=_FAINT_INK)
    panels[0].legend(fontsize=6, frameon=False, loc="lower right")
    _save(figure, panels[: len(tradeoffs)], path, bottom=None)


def draw_lines(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    path: Path,
) -> None:
    """Writes a PNG of lines with their points; each is its xs and ys."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for colour, (label, (xs, ys)) in zip(_COLOURS, lines.items(), strict=False):
        axis.plot(xs, ys, color=colour, marker="o", markersize=4, label=label)
    _set_title(axis, title)
    axis.set_xlabel(x_label, color=_FAINT_INK)
    axis.set_ylabel(y_label, color=_FAINT_INK)
    axis.legend(fontsize=8, frameon=False)
    _save(figure, [axis], path)


def _set_title(axis: Axes, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=10, fontweight="bold", color=_INK)


def _save(figure: Figure, axes: Sequence[Axes], path: Path, *, bottom: float | None = 0.0) -> None:
    for axis in axes:
        axis.set_ylim(bottom=bottom)
        axis.tick_params(labelcolor=_INK, labelsize=8)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
