"""Bandwidth and latency of the KV transports between two processes, beside what the machine can.

Owns the order of things and the command line. `python -m benchmarks.kv_transfer --help` is the
command.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch

from benchmarks import kv_transfer_report as report
from benchmarks.compare import positive, say
from benchmarks.kv_transfer_chart import write_chart
from benchmarks.kv_transfer_memory import Case, cases
from benchmarks.kv_transfer_nixl import TransferFailedError
from benchmarks.kv_transfer_peer import PeerFailedError, running_peer
from benchmarks.kv_transfer_report import Cell, Results, size_text
from benchmarks.kv_transfer_ways import Run, Ways, devices, peer_device, with_groups
from benchmarks.machine import observe_machine

_RESULTS = Path(__file__).resolve().parent / "results"
_SIZES = tuple(1 << exponent for exponent in range(16, 29, 2))
_DESCRIPTORS = (64 << 10, 1 << 20)
_MIN_RUNS, _MAX_RUNS, _ENOUGH_S = 3, 50, 0.2


def seconds_of(run: Run, clock: Callable[[], float] = time.perf_counter) -> float:
    """The median of a few transfers, of many where they are short."""
    taken: list[float] = []
    while len(taken) < _MIN_RUNS or (len(taken) < _MAX_RUNS and sum(taken) < _ENOUGH_S):
        begin_s = clock()
        run()
        taken.append(clock() - begin_s)
    return median(taken)


def measure(
    device_name: str, device: torch.device, chosen: Sequence[Case], *, num_rounds: int
) -> Results:
    """All rounds in one kind of memory.

    Raises:
        PeerFailedError: the other process did not start, or ended.
        TransferFailedError: a way failed, or moved the wrong bytes.
        OSError: this process may not read the other.
    """
    num_bytes = max(case.size_bytes for case in chosen)
    descriptors = sorted({case.descriptor_bytes for case in chosen})
    results: dict[Cell, list[float]] = defaultdict(list)
    groups = with_groups(device)
    if not groups:
        say("    no NCCL pair: it needs two GPUs")
    with (
        running_peer(num_bytes, peer_device(device), descriptors, with_groups=groups) as peer,
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
                _say_turn(results, device_name, case, number, num_rounds)
    return results


def _say_turn(results: Results, device_name: str, case: Case, number: int, num_rounds: int) -> None:
    rates = ", ".join(
        f"{cell.way} {cell.size_bytes / taken[-1] / 1e9:.2f}"
        for cell, taken in results.items()
        if (cell.size_bytes, cell.descriptor_bytes) == (case.size_bytes, case.descriptor_bytes)
    )
    say(
        f"round {number + 1} of {num_rounds}, {device_name}: {size_text(case.size_bytes)}"
        f" by {size_text(case.descriptor_bytes)}, GB/s: {rates}"
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kv_transfer",
        description="Moves memory between two processes over every transport and beside"
        " process_vm_readv and a plain copy, in turn, and writes kv_transfer.md, kv_transfer.json"
        " and kv_transfer.png. Takes a few minutes; use the machine for nothing else meanwhile.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=positive, default=5, help="turns of each way")
    parser.add_argument(
        "--sizes", nargs="+", type=positive, default=list(_SIZES), help="bytes of a transfer"
    )
    parser.add_argument(
        "--descriptors",
        nargs="+",
        type=positive,
        default=list(_DESCRIPTORS),
        help="bytes of the pieces that it is made of",
    )
    parser.add_argument("--out", type=Path, default=_RESULTS, help="the folder for the results")
    options = parser.parse_args()
    chosen = cases(options.sizes, options.descriptors)
    if not chosen:
        parser.error("none of the sizes is made of whole descriptors")

    results: dict[Cell, Sequence[float]] = {}
    try:
        for name, device in devices().items():
            results |= measure(name, device, chosen, num_rounds=options.rounds)
    except (PeerFailedError, TransferFailedError, OSError) as failure:
        print(f"no figures: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: what was started has been stopped", file=sys.stderr)
        return 130
    report.write(results, observe_machine(), options.out)
    write_chart(results, options.out / "kv_transfer.png")
    for panel in report.panels(results):
        print(f"\n{panel[0]}, GB/s\n\n{report.bandwidth_table(results, *panel)}")
    if verdicts := report.judge(results):
        print(f"\n{report.verdict_table(verdicts)}\n")
    say(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
