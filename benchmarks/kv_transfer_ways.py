"""The ways in which the benchmark moves memory, one like the other: prepare a case, then run it.

Owns the measuring process's memory and its ends of the transports. Never takes the time.
"""

import queue
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import count
from types import TracebackType

import torch

from benchmarks.kv_transfer_kernel import memory_copy, vm_read
from benchmarks.kv_transfer_memory import Case, new_memory
from benchmarks.kv_transfer_nixl import NixlPeer, NixlSide, TransferFailedError
from benchmarks.kv_transfer_peer import (
    ENGINE_ID,
    HOST,
    TIMEOUT_S,
    Peer,
    digest_of,
    layout_of,
    pages_of,
)
from kvtransfer.p2p_fetch import FetchJob, Local, Outcome, PairClient, Remote
from kvtransfer.p2p_link import transport_for

Run = Callable[[], None]
"""One transfer of a case, from the request for it to the last byte."""

COPY, VM_READ, PULL, PUSH, GLOO, NCCL = (
    "memory copy",
    "process_vm_readv",
    "NIXL pull",
    "NIXL push",
    "Gloo pair",
    "NCCL pair",
)
TRANSPORTS = (PULL, PUSH, GLOO, NCCL)


class Ways:
    """All ways between this process and a peer. Owns the memory here, and a group for each size."""

    def __init__(self, num_bytes: int, device: torch.device, peer: Peer) -> None:
        self._memory = new_memory(num_bytes, device, seed=1)
        self._peer = peer
        facts = peer.facts
        self._groups = {
            size: _Group(self._memory, size, port, facts.group_secret)
            for size, port in facts.group_ports.items()
        }
        self._prepare: dict[str, Callable[[Case], Run]] = {
            COPY: lambda case: memory_copy(case, self._memory),
        }
        if facts.nixl_metadata is not None:
            side = NixlSide(self._memory)
            nixl = NixlPeer(side, facts.nixl_metadata, facts.address, facts.device)
            self._prepare[PULL] = lambda case: nixl.transfer(case, "READ")
            self._prepare[PUSH] = lambda case: nixl.transfer(case, "WRITE")
        if self._groups:
            name = NCCL if device.type == "cuda" else GLOO
            self._prepare[name] = lambda case: self._groups[case.descriptor_bytes].run_of(case)
        if device.type == "cpu":
            self._prepare[VM_READ] = lambda case: vm_read(
                case, self._memory, facts.pid, facts.address
            )

    @property
    def names(self) -> tuple[str, ...]:
        """In the order in which they take turns: what is compared follows each other."""
        order = (COPY, VM_READ, PULL, PUSH, GLOO, NCCL)
        return tuple(name for name in order if name in self._prepare)

    def prepare(self, name: str, case: Case) -> Run:
        """What a pair does once, and not for each request."""
        return self._prepare[name](case)

    def check(self, name: str, case: Case, run: Run) -> None:
        """Runs once, and raises TransferFailedError where the two sides then differ."""
        self._memory.view(torch.int64).add_(1)
        run()
        if name == COPY:
            return
        if digest_of(self._memory, case, case.here) != self._peer.digest(case):
            raise TransferFailedError(f"{name} moved other bytes than it was asked for")

    def __enter__(self) -> "Ways":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with ExitStack() as stack:
            for group in self._groups.values():
                stack.callback(group.stop)


class _Group:
    """The connector's own path: a fetch over the pair's group, staging copies included."""

    def __init__(self, memory: torch.Tensor, descriptor_bytes: int, port: int, secret: str) -> None:
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        local = Local(
            engine_id="measuring",
            secret=secret,
            rank=(0, 0),
            layout=layout_of(descriptor_bytes),
            pages=pages_of(memory, descriptor_bytes),
            transport=transport_for(memory.device, HOST, timeout_s=TIMEOUT_S),
            timeout_s=TIMEOUT_S,
        )
        remote = Remote(engine_id=ENGINE_ID, host=HOST, port=port)
        self._client = PairClient(local, remote, self._outcomes)
        self._leases = count()

    def run_of(self, case: Case) -> Run:
        return lambda: self._fetch(case)

    def stop(self) -> None:
        self._client.stop()
        self._client.join(TIMEOUT_S)

    def _fetch(self, case: Case) -> None:
        lease_id = next(self._leases)
        self._client.submit(
            FetchJob(
                request_id="measured",
                remote_request_id=str(lease_id),
                lease_id=lease_id,
                local_block_ids=(case.here,),
                remote_block_ids=(case.there,),
                awaited=True,
            )
        )
        outcome = self._outcomes.get()
        if outcome.error is not None:
            raise TransferFailedError(str(outcome.error))


def with_groups(device: torch.device) -> bool:
    """Whether a pair's group is possible: NCCL wants a GPU for each of the two."""
    return device.type == "cpu" or torch.cuda.device_count() > 1


def peer_device(device: torch.device) -> torch.device:
    """Another GPU where there is one."""
    return torch.device("cuda:1") if device.type == "cuda" and with_groups(device) else device


def devices() -> Mapping[str, torch.device]:
    """Kinds of memory that this machine has."""
    found = {"memory": torch.device("cpu")}
    if torch.cuda.is_available():
        found["GPU memory"] = torch.device("cuda:0")
    return found
