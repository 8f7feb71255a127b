"""The other process: memory that is read and written, and what serves the pair's group.

Owns that process and its memory. Never takes the time.
"""

import contextlib
import multiprocessing
import os
import secrets
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from typing import Any

import msgspec
import torch

from benchmarks.kv_transfer_memory import Case, address_of, new_memory, pieces
from benchmarks.kv_transfer_nixl import NixlSide
from kvtransfer.p2p_handshake import KVLayout, WorkerAddress
from kvtransfer.p2p_leases import Leases
from kvtransfer.p2p_link import transport_for
from kvtransfer.p2p_pages import KVPages, Region
from kvtransfer.p2p_serve import PairServer
from kvtransfer.side_channel import SideChannel

HOST = "127.0.0.1"
ENGINE_ID = "peer"
TIMEOUT_S = 60.0
NUM_LEASES = 1_000_000
"""More than there can be fetches; each is for one, as a request's is."""
_SEED = 1 << 40
_START_S = 120


class PeerFailedError(Exception):
    """The other process did not start, or ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerFacts:
    """What the measuring process must know of the other."""

    pid: int
    address: int
    device: int
    nixl_metadata: bytes | None
    """None where NIXL is not wanted."""
    group_ports: dict[int, int]
    """The side channel of the group for each descriptor size; none where no group is possible."""
    group_secret: str


class Peer:
    """The process, seen from the measuring one."""

    def __init__(self, pipe: Pipe, facts: PeerFacts) -> None:
        self._pipe, self.facts = pipe, facts

    def digest(self, case: Case) -> int:
        """Of the bytes of a case's descriptors over there."""
        self._pipe.send(case)
        digest: int = self._pipe.recv()
        return digest


def layout_of(descriptor_bytes: int) -> KVLayout:
    """A cache whose blocks are these descriptors."""
    return KVLayout(
        wire_version=1,
        vllm_version="",
        model="benchmark",
        dtype="uint8",
        cache_dtype="uint8",
        block_size=1,
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        bytes_of_a_block=(descriptor_bytes,),
    )


def pages_of(memory: torch.Tensor, descriptor_bytes: int) -> KVPages:
    """The whole memory as such a cache."""
    whole = Case(size_bytes=memory.numel(), descriptor_bytes=descriptor_bytes)
    return KVPages([Region(pages=pieces(memory, whole), group=0)])


def digest_of(memory: torch.Tensor, case: Case, numbers: Sequence[int]) -> int:
    """In the order of `numbers`."""
    chosen = pieces(memory, case)[torch.tensor(numbers, device=memory.device)]
    return zlib.crc32(chosen.cpu().numpy().data)


@contextlib.contextmanager
def running_peer(
    num_bytes: int,
    device: torch.device,
    descriptors: Sequence[int],
    *,
    with_nixl: bool,
    with_groups: bool,
) -> Iterator[Peer]:
    """Starts the process, and ends it. Raises PeerFailedError."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    arguments = (there, num_bytes, str(device), tuple(descriptors), with_nixl, with_groups)
    process = context.Process(target=_serve, args=arguments, daemon=True)
    process.start()
    there.close()
    try:
        try:
            if not here.poll(_START_S):
                raise PeerFailedError("the other process does not start")
            yield Peer(here, here.recv())
        except EOFError as error:
            raise PeerFailedError("the other process ended; see its messages above") from error
    finally:
        here.close()  # The other process ends at that.
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(
    pipe: Pipe,
    num_bytes: int,
    device_name: str,
    descriptors: Sequence[int],
    with_nixl: bool,
    with_groups: bool,
) -> None:
    device = torch.device(device_name)
    memory = new_memory(num_bytes, device, seed=_SEED)
    side = NixlSide(memory) if with_nixl else None
    with contextlib.ExitStack() as stack:
        ports, secret = {}, secrets.token_hex()
        if with_groups:
            ports = {size: _serve_group(stack, memory, size, secret) for size in descriptors}
        facts = PeerFacts(
            pid=os.getpid(),
            address=address_of(memory),
            device=max(memory.get_device(), 0),
            nixl_metadata=None if side is None else side.metadata(),
            group_ports=ports,
            group_secret=secret,
        )
        pipe.send(facts)
        with contextlib.suppress(EOFError):
            while True:
                case: Case = pipe.recv()
                pipe.send(digest_of(memory, case, case.there))


def _serve_group(stack: contextlib.ExitStack, memory: torch.Tensor, size: int, secret: str) -> int:
    leases = Leases(extension_s=0)
    leases.admit({str(number): number for number in range(NUM_LEASES)})
    server = PairServer(
        HOST,
        engine_id=ENGINE_ID,
        secret=secret,
        leases=leases,
        pages=pages_of(memory, size),
        transport=transport_for(memory.device, HOST, timeout_s=TIMEOUT_S),
        timeout_s=TIMEOUT_S,
    )
    stack.callback(server.stop)
    address: Any = WorkerAddress(host=HOST, port=server.port, layout=layout_of(size))
    payloads = {(0, 0): msgspec.msgpack.encode(address)}
    channel = SideChannel(HOST, payloads, engine_id=ENGINE_ID, secret=secret)
    stack.callback(channel.stop)
    return channel.port
