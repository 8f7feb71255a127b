"""A prefill's and a decode's worker of the NIXL connector in one process, without engines.

Between them is real NIXL; `SlowReads` takes the blocks' way, as slow as it is told to be, on a
clock of its own.
"""

import secrets
import time
from collections import deque
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from vllm import AsyncEngineArgs
from vllm.config import KVTransferConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

from engine.models import resolve_model
from kvtransfer.config import Role, kv_transfer_config
from kvtransfer.credentials import Credentials, give_credentials
from kvtransfer.side_channel import SideChannel
from kvtransfer.stats import pair_deltas
from kvtransfer.worker import LeasedMetadata, PdNixlWorker

HOST = "127.0.0.1"
SECRET = secrets.token_hex()
LAYER = "model.layers.0.self_attn.attn"
NUM_BLOCKS = 600
BLOCK_SIZE = 32


@dataclass
class Clock:
    """Seconds that pass when a test says so."""

    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class _Read:
    num_bytes: int
    left: float


@dataclass
class SlowReads:
    """NIXL's agent, but for reads of blocks: these share a rate, and arrive when the clock says so.

    Reads of leases go on at once, or not at all while the peer is `silent`.
    """

    agent: Any
    clock: Clock
    bytes_per_s: float
    silent: bool = False
    fails: int = 0
    """So many reads of blocks fail when they are looked at."""
    sticks: int = 0
    """So often a read of blocks cannot be cancelled."""
    most_at_once: int = 0
    first_blocks: list[int] = field(default_factory=list)
    """Of each read, in their order."""
    under_way: deque[_Read] = field(default_factory=deque)
    _since_s: float = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.agent, name)

    def make_prepped_xfer(self, operation: str, *sides: Any, **_: Any) -> _Read:
        assert operation == "READ"
        _, _, there, ids = sides
        num_bytes = int(there.lengths[ids].sum())
        self.first_blocks.append(int(ids[0]))
        self.agent.num_bytes_made += num_bytes
        return _Read(num_bytes=num_bytes, left=num_bytes)

    def transfer(self, handle: Any) -> Any:
        if not isinstance(handle, _Read):
            return self.agent.transfer(handle)
        self._move()
        self.under_way.append(handle)
        self.most_at_once = max(self.most_at_once, sum(read.num_bytes for read in self.under_way))
        return "PROC"

    def check_xfer_state(self, handle: Any) -> Any:
        if not isinstance(handle, _Read):
            return "PROC" if self.silent else self.agent.check_xfer_state(handle)
        self._move()
        if self.fails and handle in self.under_way:
            self.fails -= 1
            return "ERR"
        return "PROC" if handle in self.under_way else "DONE"

    def get_xfer_telemetry(self, handle: _Read) -> Any:
        seconds = handle.num_bytes / self.bytes_per_s
        return SimpleNamespace(
            totalBytes=handle.num_bytes, xferDuration=seconds * 1e6, postDuration=0.0, descCount=1
        )

    def release_xfer_handle(self, handle: Any) -> None:
        if not isinstance(handle, _Read):
            self.agent.release_xfer_handle(handle)
        elif self.sticks and handle in self.under_way:
            self.sticks -= 1
            raise ConnectionError("injected")
        elif handle in self.under_way:
            self.under_way.remove(handle)

    def _move(self) -> None:
        """All that are under way share the rate."""
        moved = 0.0 if self.silent else (self.clock.now_s - self._since_s) * self.bytes_per_s
        self._since_s = self.clock.now_s
        while self.under_way and moved > 0:
            share = min(moved / len(self.under_way), min(read.left for read in self.under_way))
            for read in self.under_way:
                read.left -= share
            moved -= share * len(self.under_way)
            self.under_way = deque(read for read in self.under_way if read.left > 1e-6)


@dataclass(kw_only=True)
class Workers:
    """The two, their clock, and what stands between them."""

    prefill: PdNixlWorker
    decode: PdNixlWorker
    channel: SideChannel
    clock: Clock
    reads: SlowReads
    finished: list[str] = field(default_factory=list)
    """In the order in which decode had them; a step's in no order."""
    failed: set[str] = field(default_factory=set)
    _lease_id: int = 0

    def ask_for(self, request_ids: list[str]) -> None:
        """Prefill holds these requests of two blocks each, and decode is to read them, in order."""
        held, wanted = LeasedMetadata(_nothing()), LeasedMetadata(_nothing())
        for request_id in request_ids:
            self._lease_id += 1
            held.granted_lease_ids[request_id] = self._lease_id
            wanted.remote_lease_ids[request_id] = self._lease_id
            first = 2 * self._lease_id % NUM_BLOCKS
            blocks = [first, first + 1]
            wanted.add_new_req_to_recv(
                request_id,
                (blocks,),
                {
                    "remote_block_ids": (blocks,),
                    "remote_engine_id": "prefill",
                    "remote_request_id": request_id,
                    "remote_host": HOST,
                    "remote_port": self.channel.port,
                    "tp_size": 1,
                },
                awaiting_kvs=True,
            )
        self.prefill.start_load_kv(held)
        self._step(wanted)

    def step(self, seconds: float) -> None:
        """Time passes, and decode looks."""
        self.clock.now_s += seconds
        self._step(LeasedMetadata(_nothing()))

    def until(
        self,
        num_finished: int,
        *,
        step_s: float,
        within_s: float,
        beside: Set[str] = frozenset(),
    ) -> float:
        """The clock's seconds until so many requests are finished.

        It stands while there are handshakes, but for those `beside`.
        """
        since_s, give_up_s = self.clock.now_s, time.monotonic() + 60
        while len(self.finished) < num_finished:
            assert self.clock.now_s - since_s < within_s, "not in time"
            assert time.monotonic() < give_up_s, "not at all"
            # To a handshake and to what real NIXL reads the clock means nothing.
            is_asked = self.decode._questions and not self.reads.silent
            is_connecting = self.decode._handshake_futures.keys() - beside
            self.step(0.0 if is_connecting or is_asked else step_s)
            time.sleep(0.0005)
        return self.clock.now_s - since_s

    @property
    def read_bytes(self) -> int:
        """Of each request."""
        return 2 * int(self.decode.block_len_per_layer[0])

    @property
    def num_failures(self) -> int:
        """Attempts to read that did not end well."""
        (delta,) = pair_deltas(self.decode.xfer_stats.data)
        return delta.num_failures

    @property
    def connection(self) -> Any:
        """Made anew with each handshake; None without one."""
        return self.decode._remote_tables.get("prefill")

    def _step(self, metadata: LeasedMetadata) -> None:
        self.decode.start_load_kv(metadata)
        results = self.decode.get_transfer_results()
        self.finished += sorted(results.finished_recving)
        self.failed |= results.failed_recving


def _nothing() -> Any:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlConnectorMetadata

    return NixlConnectorMetadata()


@contextmanager
def nixl_workers(
    patch: pytest.MonkeyPatch, *, bytes_per_s: float, read_timeout_s: float
) -> Iterator[Workers]:
    """A pair whose decode knows its prefill already."""
    patch.setenv("VLLM_NIXL_SIDE_CHANNEL_HOST", HOST)
    patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    configs = [_config(role, read_timeout_s) for role in ("prefill", "decode")]
    with set_current_vllm_config(configs[0]):
        init_distributed_environment(1, 0, f"tcp://{HOST}:0", 0, "gloo")
        initialize_model_parallel(1, 1)
    try:
        prefill, decode = (_worker(config) for config in configs)
        payload = msgspec.msgpack.encode(prefill.xfer_handshake_metadata)
        channel = SideChannel(HOST, {(0, 0): payload}, engine_id="prefill", secret=SECRET)
        clock = Clock()
        reads = SlowReads(decode.nixl_wrapper, clock, bytes_per_s)
        decode._clock = clock
        _connect(decode, channel.port)
        decode.nixl_wrapper = reads
        try:
            yield Workers(prefill=prefill, decode=decode, channel=channel, clock=clock, reads=reads)
        finally:
            channel.stop()
            for worker in (decode, prefill):
                worker.shutdown()
    finally:
        cleanup_dist_env_and_memory()


def _connect(decode: PdNixlWorker, port: int) -> None:
    give_up_s = time.monotonic() + 60
    while not (ready := decode.warm_up("prefill", HOST, port, 1))[0]:
        assert time.monotonic() < give_up_s
        time.sleep(0.001)
    assert ready == (True, None)


def _config(role: Role, read_timeout_s: float) -> VllmConfig:
    transfer = kv_transfer_config(
        role,
        engine_id=role,
        lease_s=30,
        backends=["UCX"],
        read_timeout_s=read_timeout_s,
        shared_memory="never",
    )
    config: VllmConfig = AsyncEngineArgs(
        model=resolve_model("demo"),
        dtype="float32",
        block_size=BLOCK_SIZE,
        enforce_eager=True,
        kv_transfer_config=KVTransferConfig(**transfer),
    ).create_engine_config()
    config.cache_config.kv_cache_layout = "LBHNC"  # As the engine core would have it.
    give_credentials(config, Credentials(secret=SECRET))
    return config


def _worker(config: VllmConfig) -> PdNixlWorker:
    model = config.model_config
    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE,
        num_kv_heads=model.get_total_num_kv_heads(),
        head_size=model.get_head_size(),
        dtype=torch.float32,
    )
    caches = KVCacheConfig(
        num_blocks=NUM_BLOCKS,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec([LAYER], spec)],
    )
    with set_current_vllm_config(config):
        worker = PdNixlWorker(config, config.kv_transfer_config.engine_id, caches)
        words = spec.page_size_bytes // 4
        cache = torch.zeros(NUM_BLOCKS, words).view(
            NUM_BLOCKS, model.get_total_num_kv_heads(), BLOCK_SIZE, -1
        )
        worker.register_kv_caches({LAYER: cache})
    return worker
