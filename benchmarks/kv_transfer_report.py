"""What the transfer benchmark says: bandwidths, latencies, the target, and the files with them.

Owns their looks. Pure but for `write`; never measures, never draws.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from benchmarks.kv_transfer_memory import size_text
from benchmarks.kv_transfer_rounds import Cell, Results
from benchmarks.kv_transfer_ways import PULL, PUSH, VM_READ
from benchmarks.machine import Machine

TARGET_SIZE_BYTES = 256 << 20
TARGET_RATIO = 0.9


def bandwidths(results: Results, cell: Cell) -> tuple[float, ...]:
    """Bytes a second, round by round."""
    return tuple(cell.size_bytes / seconds for seconds in results[cell])


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A way's bandwidth by process_vm_readv's in the same round; the median over the rounds."""

    cell: Cell
    ratio: float

    @property
    def met(self) -> bool:
        return self.ratio >= TARGET_RATIO


def judge(results: Results) -> tuple[Verdict, ...]:
    """NIXL at the target's size, where it and process_vm_readv were measured."""
    return tuple(
        Verdict(
            cell=cell,
            ratio=median(
                bound / seconds for bound, seconds in zip(results[other], taken, strict=True)
            ),
        )
        for cell, taken in results.items()
        if cell.way in (PULL, PUSH) and cell.size_bytes == TARGET_SIZE_BYTES
        for other in [_of_way(cell, VM_READ)]
        if other in results
    )


def bandwidth_table(results: Results, device: str, descriptor_bytes: int) -> str:
    """GB/s, a row for each size and a column for each way; Markdown."""
    return _table(
        results,
        device,
        descriptor_bytes,
        lambda cell: _range([rate / 1e9 for rate in bandwidths(results, cell)], digits=2),
    )


def latency_table(results: Results, device: str, descriptor_bytes: int) -> str:
    """Microseconds, a row for each size and a column for each way; Markdown."""
    return _table(
        results,
        device,
        descriptor_bytes,
        lambda cell: _range([seconds * 1e6 for seconds in results[cell]], digits=0),
    )


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """Markdown."""
    rows = [["", "descriptors", "by process_vm_readv", "target", "met"]]
    rows += [
        [
            verdict.cell.way,
            size_text(verdict.cell.descriptor_bytes),
            f"{verdict.ratio:.2f}",
            f"≥ {TARGET_RATIO:g}",
            "yes" if verdict.met else "**no**",
        ]
        for verdict in verdicts
    ]
    return _markdown(rows)


def as_json(results: Results) -> str:
    """A list, one entry a cell."""
    entries = [
        asdict(cell)
        | {
            "seconds": {"median": median(taken), "min": min(taken), "max": max(taken)},
            "bytes_per_s": cell.size_bytes / median(taken),
        }
        for cell, taken in results.items()
    ]
    return json.dumps(entries, indent=2) + "\n"


def as_markdown(results: Results, machine: Machine) -> str:
    """The whole report."""
    verdicts = judge(results)
    target = f"## Target, at {size_text(TARGET_SIZE_BYTES)}\n\n{verdict_table(verdicts)}"
    sections = [
        "# KV transfer\n\nWritten by `python -m benchmarks.kv_transfer`; do not edit.",
        target if verdicts else None,
        "![Bandwidth over message sizes](kv_transfer.png)",
        *(
            f"## Between two processes, {device}, descriptors of {size_text(descriptor)}\n\n"
            f"GB/s, medians of {num_rounds(results)} rounds (lowest to highest):\n\n"
            f"{bandwidth_table(results, device, descriptor)}\n\n"
            f"Microseconds:\n\n{latency_table(results, device, descriptor)}"
            for device, descriptor in panels(results)
        ),
        f"## How it was measured\n\n{_METHOD.rstrip()}",
        f"## Machine\n\n{machine.markdown()}",
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def write(results: Results, machine: Machine, folder: Path) -> None:
    """Writes `kv_transfer.json` and `kv_transfer.md`, making the folder if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kv_transfer.json").write_text(as_json(results))
    (folder / "kv_transfer.md").write_text(as_markdown(results, machine))


def panels(results: Results) -> tuple[tuple[str, int], ...]:
    """Each kind of memory with each descriptor size."""
    return tuple(dict.fromkeys((cell.device, cell.descriptor_bytes) for cell in results))


def ways(results: Results, device: str) -> tuple[str, ...]:
    """In the order in which they took turns."""
    return tuple(dict.fromkeys(cell.way for cell in results if cell.device == device))


def sizes(results: Results, device: str, descriptor_bytes: int) -> tuple[int, ...]:
    return tuple(
        sorted(
            {
                cell.size_bytes
                for cell in results
                if (cell.device, cell.descriptor_bytes) == (device, descriptor_bytes)
            }
        )
    )


def num_rounds(results: Results) -> int:
    return min(len(taken) for taken in results.values())


_METHOD = """\
Two processes on this machine, each with its own memory of the largest size, all of it backed. In
each round every way in turn moves every size; a cell is the median of a round's transfers, and the
tables show the median over the rounds. The first transfer of a way and size is not counted: there
the bytes on both sides are compared instead.

- The descriptors of a transfer lie in another order on each side, as the blocks of a KV cache do.
- Memory copy: one copy of the whole inside one process by one thread, the bound for all.
- process_vm_readv: the kernel's copy between processes with the same descriptors, as few calls as
  Linux allows. It asks nobody and tells nobody.
- NIXL: agents as the connector has them, with a progress thread that waits. Descriptor lists are
  prepared once, as for a pair; a transfer is from choosing descriptors to seeing it done. After its
  first millisecond it is looked at with pauses of 2 % of its time.
- Pair: the `nccl` connector's own path, a process group of two: the request to the other process,
  its check of the lease, the blocks gathered, sent and scattered in chunks.
"""


def _table(
    results: Results, device: str, descriptor_bytes: int, text: Callable[[Cell], str]
) -> str:
    names = ways(results, device)
    rows = [["", *names]]
    for size in sizes(results, device, descriptor_bytes):
        cells = [
            Cell(device=device, way=way, size_bytes=size, descriptor_bytes=descriptor_bytes)
            for way in names
        ]
        rows.append([size_text(size), *(text(cell) if cell in results else "" for cell in cells)])
    return _markdown(rows)


def _of_way(cell: Cell, way: str) -> Cell:
    return replace(cell, way=way)


def _range(values: Sequence[float], *, digits: int) -> str:
    middle, low, high = (
        f"{value:,.{digits}f}" for value in (median(values), min(values), max(values))
    )
    return f"{middle} ({low} to {high})"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])
