"""Rounds of transfers: every way in turn moves every size, and takes its time.

Owns the clock and the order of things. Never says what they mean. Needs torch, msgspec, and NIXL
where its ways are wanted: nothing else, so that it runs where there is little else.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from benchmarks.kv_transfer_memory import Case, size_text
from benchmarks.kv_transfer_peer import running_peer
from benchmarks.kv_transfer_ways import Run, Ways, peer_device, with_groups

_MIN_RUNS, _MAX_RUNS, _ENOUGH_S = 3, 50, 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One way, one message size, one descriptor size, in one kind of memory."""

    device: str
    way: str
    size_bytes: int
    descriptor_bytes: int


Results = Mapping[Cell, Sequence[float]]
"""The median seconds of a transfer, one for each round."""


def seconds_of(run: Run, clock: Callable[[], float] = time.perf_counter) -> float:
    """The median of a few transfers, of many where they are short."""
    taken: list[float] = []
    while len(taken) < _MIN_RUNS or (len(taken) < _MAX_RUNS and sum(taken) < _ENOUGH_S):
        begin_s = clock()
        run()
        taken.append(clock() - begin_s)
    return median(taken)


def measure(
    device_name: str,
    device: torch.device,
    chosen: Sequence[Case],
    *,
    num_rounds: int,
    say: Callable[[str], None],
    with_nixl: bool = True,
    with_pairs: bool = True,
) -> dict[Cell, list[float]]:
    """All rounds in one kind of memory.

    Raises:
        PeerFailedError: the other process did not start, or ended.
        TransferFailedError: a way failed, or moved the wrong bytes.
        OSError: this process may not read the other.
    """
    num_bytes = max(case.size_bytes for case in chosen)
    descriptors = sorted({case.descriptor_bytes for case in chosen})
    results: dict[Cell, list[float]] = defaultdict(list)
    groups = with_pairs and with_groups(device)
    if with_pairs and not groups:
        say("    no NCCL pair: it needs two GPUs")
    with (
        running_peer(
            num_bytes, peer_device(device), descriptors, with_nixl=with_nixl, with_groups=groups
        ) as peer,
        Ways(num_bytes, device, peer) as ways,
    ):
        runs = {(way, case): ways.prepare(way, case) for case in chosen for way in ways.names}
        for number in range(num_rounds):
            for case in chosen:
                for way in ways.names:
                    run = runs[way, case]
                    if number == 0:
                        ways.check(way, case, run)
                    cell = Cell(
                        device=device_name,
                        way=way,
                        size_bytes=case.size_bytes,
                        descriptor_bytes=case.descriptor_bytes,
                    )
                    results[cell].append(seconds_of(run))
                say(f"round {number + 1} of {num_rounds}, {_rates(results, device_name, case)}")
    return results


def _rates(results: Results, device: str, case: Case) -> str:
    rates = ", ".join(
        f"{cell.way} {cell.size_bytes / taken[-1] / 1e9:.2f}"
        for cell, taken in results.items()
        if (cell.size_bytes, cell.descriptor_bytes) == (case.size_bytes, case.descriptor_bytes)
    )
    sizes = f"{size_text(case.size_bytes)} by {size_text(case.descriptor_bytes)}"
    return f"{device}: {sizes}, GB/s: {rates}"
