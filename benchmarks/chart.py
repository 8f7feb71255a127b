"""The comparison as a picture: one small panel a metric, one bar a system.

Owns its looks. Never computes more than a median.
"""

from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from benchmarks.report import BEFORE, SHOWN, SPLIT, SUBJECT, SUBJECT_TITLES, Rounds, values_of

_PANELS = {
    "ttft_s_p50_20": "TTFT p50, 20-token prompt",
    "ttft_s_p50_500": "TTFT p50, 500-token prompt",
    "itl_s_mean": "Mean inter-token latency",
    "handover_s_p50": "First token to second, p50",
    "tokens_per_s_c8": "Throughput, 8 clients",
    "tokens_per_s_c32": "Throughput, 32 clients",
}
_LABELS = {
    "vllm": "bare vLLM",
    "ray-llm": "Ray Serve LLM\nas shipped",
    "ray-llm-tuned": "Ray Serve LLM\ntuned",
    BEFORE: "pdserve\nbefore",
    SUBJECT: SUBJECT,
    SPLIT: "pdserve\nalways split",
}
_SUBJECT_COLOUR, _PEER_COLOUR = "#1f6feb", "#b6bec9"
_INK, _FAINT_INK = "#24292f", "#6e7781"


def write_chart(rounds: Rounds, path: Path) -> None:
    """Writes a PNG: bars are medians, lines the range over the rounds."""
    num_rounds = min(len(metrics) for metrics in rounds.values())
    figure = Figure(figsize=(12, 6), layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12))
    for axis, (metric, title) in zip(figure.subplots(2, 3).flat, _PANELS.items(), strict=True):
        _draw_panel(axis, rounds, metric)
        axis.set_title(title, loc="left", fontweight="bold", fontsize=10, color=_INK, pad=16)
        better = "more" if metric.startswith("tokens") else "less"
        subtitle = f"{SHOWN[metric].unit}, {better} is better"
        axis.text(0, 1.02, subtitle, transform=axis.transAxes, color=_FAINT_INK, fontsize=8)
    figure.supxlabel(
        f"Medians of {num_rounds} rounds; lines run from the lowest to the highest."
        " Latencies: one client.",
        fontsize=8,
        color=_FAINT_INK,
    )
    figure.savefig(path, dpi=160)


def _draw_panel(axis: Axes, rounds: Rounds, metric: str) -> None:
    systems = list(rounds)
    values = [values_of(rounds, system, metric) for system in systems]
    medians = [median(of_system) for of_system in values]
    axis.barh(
        range(len(systems)),
        medians,
        height=0.62,
        color=[_SUBJECT_COLOUR if system in SUBJECT_TITLES else _PEER_COLOUR for system in systems],
    )
    axis.hlines(
        range(len(systems)),
        [min(of_system) for of_system in values],
        [max(of_system) for of_system in values],
        color=_INK,
        linewidth=1,
    )
    span = max(max(of_system) for of_system in values)
    for row, (middle, of_system) in enumerate(zip(medians, values, strict=True)):
        axis.text(
            max(of_system) + 0.02 * span,
            row,
            SHOWN[metric].format(middle),
            va="center",
            fontsize=9,
            color=_INK,
        )
    axis.set_yticks(range(len(systems)), [_LABELS[system] for system in systems], fontsize=9)
    axis.set_xlim(0, span * 1.18)
    axis.invert_yaxis()
    axis.set_xticks([])
    axis.tick_params(length=0, labelcolor=_INK)
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)
    axis.spines["left"].set_color(_PEER_COLOUR)
