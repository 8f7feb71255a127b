"""The transfer benchmark as a picture: bandwidth over message size, a line for each way.

Owns its looks. Never computes more than a median.
"""

from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from benchmarks.kv_transfer_memory import size_text
from benchmarks.kv_transfer_report import bandwidths, num_rounds, panels, sizes, ways
from benchmarks.kv_transfer_rounds import Cell, Results
from benchmarks.kv_transfer_ways import COPY, GLOO, NCCL, PULL, PUSH, VM_READ

_COLOURS = {
    COPY: "#b6bec9",
    VM_READ: "#6e7781",
    PULL: "#1f6feb",
    PUSH: "#8250df",
    GLOO: "#bf8700",
    NCCL: "#1a7f37",
}
_INK, _FAINT_INK = "#24292f", "#6e7781"


def write_chart(results: Results, path: Path) -> None:
    """Writes a PNG: lines are medians, bands the range over the rounds."""
    shown = panels(results)
    figure = Figure(
        figsize=(6 * len(shown), 5), layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12)
    )
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, (device, descriptor_bytes) in zip(axes, shown, strict=True):
        _draw_panel(axis, results, device, descriptor_bytes)
        title = f"{device.capitalize()}, descriptors of {size_text(descriptor_bytes)}"
        axis.set_title(title, loc="left", fontweight="bold", fontsize=10, color=_INK, pad=16)
        axis.text(
            0, 1.02, "GB/s, more is better", transform=axis.transAxes, color=_FAINT_INK, fontsize=8
        )
    figure.supxlabel(
        f"Bytes of one transfer between two processes. Medians of {num_rounds(results)} rounds;"
        " bands run from the lowest to the highest.",
        fontsize=8,
        color=_FAINT_INK,
    )
    figure.savefig(path, dpi=160)


def _draw_panel(axis: Axes, results: Results, device: str, descriptor_bytes: int) -> None:
    ends: list[tuple[float, str]] = []
    shown = sizes(results, device, descriptor_bytes)
    for way in ways(results, device):
        rates = [
            [
                rate / 1e9
                for rate in bandwidths(
                    results,
                    Cell(
                        device=device, way=way, size_bytes=size, descriptor_bytes=descriptor_bytes
                    ),
                )
            ]
            for size in shown
        ]
        middles = [median(of_size) for of_size in rates]
        axis.plot(shown, middles, color=_COLOURS[way], linewidth=2, label=way)
        axis.fill_between(
            shown,
            [min(of_size) for of_size in rates],
            [max(of_size) for of_size in rates],
            color=_COLOURS[way],
            alpha=0.15,
            linewidth=0,
        )
        ends.append((middles[-1], way))
    axis.set_xscale("log", base=2)
    axis.set_ylim(bottom=0)
    axis.set_xticks(shown, [size_text(size) for size in shown], fontsize=8, rotation=45)
    axis.minorticks_off()
    # The legend in the order of the lines' right ends, so that it can be read across.
    handles, labels = axis.get_legend_handles_labels()
    order = [labels.index(way) for _, way in sorted(ends, reverse=True)]
    axis.legend([handles[i] for i in order], [labels[i] for i in order], frameon=False, fontsize=8)
    axis.tick_params(length=0, labelcolor=_INK)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#b6bec9")
