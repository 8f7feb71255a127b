"""A prefill worker's end of a pair without an engine, also in a process of its own to be killed."""

import signal
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from multiprocessing.process import BaseProcess

import msgspec
import torch
from forked import forked_context

from kvtransfer.p2p_handshake import KVLayout, WorkerAddress
from kvtransfer.p2p_leases import Leases
from kvtransfer.p2p_link import Transport, transport_for
from kvtransfer.p2p_pages import KVPages, Region
from kvtransfer.p2p_serve import PairServer
from kvtransfer.side_channel import SideChannel

HOST = "127.0.0.1"
SECRET = "the application's"
NUM_BLOCKS = 64
PAGE_BYTES = 64 << 10
NUM_LAYERS = 2
TIMEOUT_S = 5.0


def layout(**other: object) -> KVLayout:
    fields = {
        "wire_version": 1,
        "vllm_version": "1",
        "model": "m",
        "dtype": "float32",
        "cache_dtype": "auto",
        "block_size": 128,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "bytes_of_a_block": (PAGE_BYTES,) * NUM_LAYERS,
    }
    return KVLayout(**(fields | other))  # type: ignore[arg-type]


def new_pages(fill: int) -> tuple[KVPages, list[torch.Tensor]]:
    """Layers whose block b holds the byte `fill + b`."""
    one = (torch.arange(NUM_BLOCKS) + fill).to(torch.uint8)
    layers = [one[:, None].repeat(1, PAGE_BYTES).contiguous() for _ in range(NUM_LAYERS)]
    return KVPages([Region(pages=layer, group=0) for layer in layers]), layers


@dataclass
class Prefill:
    """Owns its leases, server and side channel. `port` is the side channel's."""

    engine_id: str
    fill: int
    timeout_s: float = TIMEOUT_S
    leases: Leases = field(default_factory=lambda: Leases(extension_s=20))
    transport: Transport | None = None
    """Gloo's where none is given."""

    def __post_init__(self) -> None:
        pages, _ = new_pages(self.fill)
        self.server = PairServer(
            HOST,
            engine_id=self.engine_id,
            secret=SECRET,
            leases=self.leases,
            pages=pages,
            transport=self.transport
            or transport_for(torch.device("cpu"), HOST, timeout_s=self.timeout_s),
            timeout_s=self.timeout_s,
        )
        address = WorkerAddress(host=HOST, port=self.server.port, layout=layout())
        payloads = {(0, 0): msgspec.msgpack.encode(address)}
        self.side_channel = SideChannel(HOST, payloads, engine_id=self.engine_id, secret=SECRET)
        self.port = self.side_channel.port

    def hold(self, request_id: str, lease_id: int) -> None:
        self.leases.admit({request_id: lease_id})
        self.leases.hold(request_id, expiry_s=time.perf_counter() + 60)

    def stop(self) -> None:
        self.server.stop()
        self.side_channel.stop()


def start_process(engine_id: str, fill: int) -> tuple[BaseProcess, int]:
    """A process that holds request `r` under lease 1, and its side channel's port."""
    context = forked_context()
    here, there = context.Pipe()
    process = context.Process(target=_hold_for_ever, args=(there, engine_id, fill), daemon=True)
    process.start()
    assert here.poll(60), "the process did not start"
    port: int = here.recv()
    return process, port


def _hold_for_ever(pipe: Pipe, engine_id: str, fill: int) -> None:
    prefill = Prefill(engine_id, fill)
    prefill.hold("r", 1)
    pipe.send(prefill.port)
    signal.pause()
