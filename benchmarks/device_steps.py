"""One step of `benchmarks.device`, in a process of its own; its last line is JSON.

Owns what a step does. Never decides which are done.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch

from benchmarks.kv_transfer_memory import Case, cases, size_text
from benchmarks.kv_transfer_nixl import TransferFailedError
from benchmarks.kv_transfer_peer import PeerFailedError, running_peer
from benchmarks.kv_transfer_rounds import Results, measure
from benchmarks.kv_transfer_ways import Ways, peer_device, with_groups

_DESCRIPTORS = (64 << 10, 1 << 20)
_SEND_S = 0.05
"""How long the other process sends before it is killed."""
_SOON_S = 60.0


def say(text: str) -> None:
    """Progress."""
    print(f"    {text}", flush=True)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures hold for."""
    found: dict[str, Any] = {"torch": torch.__version__}
    if device.type == "cuda":
        from kvtransfer.nccl_library import Nccl

        found |= {"gpu": torch.cuda.get_device_name(device), "gpus": torch.cuda.device_count()}
        with contextlib.suppress(RuntimeError):
            found["nccl"] = Nccl().version
    return found


def rates(results: Results) -> dict[str, dict[str, float]]:
    """GB/s of each way, by what was moved."""
    found: dict[str, dict[str, float]] = {}
    for cell, taken in results.items():
        sizes = f"{size_text(cell.size_bytes)} by {size_text(cell.descriptor_bytes)}"
        found.setdefault(cell.way, {})[sizes] = round(cell.size_bytes / median(taken) / 1e9, 3)
    return found


def nixl(device: torch.device, size_bytes: int, num_rounds: int) -> Mapping[str, Any]:
    chosen = cases([size_bytes], list(_DESCRIPTORS))
    results = measure(str(device), device, chosen, num_rounds=num_rounds, say=say, with_pairs=False)
    return {"GB_per_s": rates(results)}


def pair(device: torch.device, size_bytes: int, num_rounds: int) -> Mapping[str, Any]:
    chosen = cases([size_bytes], list(_DESCRIPTORS))
    results = measure(str(device), device, chosen, num_rounds=num_rounds, say=say, with_nixl=False)
    return {"GB_per_s": rates(results)}


def death(device: torch.device, size_bytes: int, num_rounds: int) -> Mapping[str, Any]:
    """Raises TransferFailedError where the device is of no use afterwards."""
    case = Case(size_bytes=size_bytes, descriptor_bytes=_DESCRIPTORS[1])
    sizes = [case.descriptor_bytes]
    with (
        running_peer(
            size_bytes, peer_device(device), sizes, with_nixl=False, with_groups=True
        ) as peer,
        Ways(size_bytes, device, peer) as ways,
    ):
        name = ways.names[-1]
        run = ways.prepare(name, case)
        ways.check(name, case, run)
        seconds, problem = _until_broken(run, peer.facts.pid)
    say(f"seen after {seconds:.2f} s: {problem}")
    ones = torch.ones(1 << 20, device=device)
    if float(ones.sum()) != ones.numel():
        raise TransferFailedError("the device does not count right any more")
    return {"seconds_until_seen": round(seconds, 3), "seen_as": problem}


def _until_broken(run: Callable[[], None], pid: int) -> tuple[float, str]:
    # From another thread, so that it is in the midst of a transfer.
    killer = threading.Timer(_SEND_S, os.kill, (pid, signal.SIGKILL))
    dies_s = time.monotonic() + _SEND_S
    killer.start()
    while time.monotonic() < dies_s + _SOON_S:
        try:
            run()
        except TransferFailedError as error:
            return time.monotonic() - dies_s, str(error)
    raise TransferFailedError("a process that is dead goes on sending")


_STEPS = {"nixl": nixl, "pair": pair, "death": death}


def main() -> int:
    """Step, device, MiB, rounds."""
    name, device_type, size_mib, num_rounds = sys.argv[1:]
    device = torch.device("cuda:0" if device_type == "cuda" else "cpu")
    told: dict[str, Any] = {"figures": None}
    if name != "nixl" and not with_groups(device):
        told["skipped"] = "NCCL wants two GPUs, and here is one"
    else:
        try:
            figures = _STEPS[name](device, int(size_mib) << 20, int(num_rounds))
            told["figures"] = {**figures, **machine(device)}
        except (TransferFailedError, PeerFailedError, ImportError, RuntimeError, OSError) as error:
            told["problem"] = " ".join(str(error).split()) or type(error).__name__
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
