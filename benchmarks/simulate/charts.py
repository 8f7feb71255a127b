"""Pictures of simulated runs. Owns their looks; computes nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.simulate.scaled_run import Outcome

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


def _save(figure: Figure, axes: Sequence[Axes], path: Path) -> None:
    for axis in axes:
        axis.set_ylim(bottom=0)
        axis.tick_params(labelcolor=_INK, labelsize=8)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
