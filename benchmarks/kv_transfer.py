"""Bandwidth and latency of the KV transports between two processes, beside what the machine can.

Owns the order of things and the command line. `python -m benchmarks.kv_transfer --help` is the
command.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import kv_transfer_report as report
from benchmarks.compare import positive, say
from benchmarks.kv_transfer_chart import write_chart
from benchmarks.kv_transfer_memory import cases
from benchmarks.kv_transfer_nixl import TransferFailedError
from benchmarks.kv_transfer_peer import PeerFailedError
from benchmarks.kv_transfer_rounds import Cell, measure
from benchmarks.kv_transfer_ways import devices
from benchmarks.machine import observe_machine

_RESULTS = Path(__file__).resolve().parent / "results"
_SIZES = tuple(1 << exponent for exponent in range(16, 29, 2))
_DESCRIPTORS = (64 << 10, 1 << 20)


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
            results |= measure(name, device, chosen, num_rounds=options.rounds, say=say)
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
