"""The worker's side of the point-to-point connector, beside the model.

Owns the worker's leases (prefill) and its pairs (decode), and tells vLLM what they came to, step by
step. Never blocks the model's thread: every transfer runs on its pair's own thread.
"""

import queue
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import torch
import vllm.envs as envs
from vllm import __version__ as vllm_version
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank, get_world_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

from kvtransfer.credentials import credentials_of
from kvtransfer.p2p_errors import FetchRefused, PairStuck
from kvtransfer.p2p_fetch import (
    FetchJob,
    HeartbeatJob,
    Local,
    Outcome,
    PairClient,
    Remote,
    WarmUpJob,
)
from kvtransfer.p2p_handshake import KVLayout, WorkerAddress
from kvtransfer.p2p_leases import Leases
from kvtransfer.p2p_link import transport_for
from kvtransfer.p2p_pages import BlockIds, KVPages
from kvtransfer.p2p_serve import PairServer
from kvtransfer.pair_reads import READ_TIMEOUT_S
from kvtransfer.stats import PairStats, WarmedWorker
from kvtransfer.tls import new_tls

WIRE_VERSION = 1
_UNUSED_PAIR_S = 600.0
_STOP_S = 1.0
_NO_LEASE = -1


class P2pWorker:
    """One rank's. Owns its leases, its server, its pairs by engine id, and its stats."""

    use_host_buffer = False
    pcp_rank = 0

    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        parallel = vllm_config.parallel_config
        for name in ("prefill_context_parallel_size", "decode_context_parallel_size"):
            if getattr(parallel, name) > 1:
                raise ValueError(f"the nccl connector does not do {name} > 1")
        options = vllm_config.kv_transfer_config
        lease_s = options.get_from_extra_config("kv_lease_duration", 30)
        self._vllm_config, self._kv_cache_config = vllm_config, kv_cache_config
        self._engine_id = engine_id
        self._is_prefill: bool = options.is_kv_producer
        self._timeout_s = float(options.get_from_extra_config("read_timeout_s", READ_TIMEOUT_S))
        self._leases = Leases(extension_s=lease_s * 2 / 3)
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._server: PairServer | None = None
        self._local: Local | None = None
        self._clients: dict[str, PairClient] = {}
        self._warm_ups: dict[str, Future[None]] = {}
        self._stats = PairStats()
        self.xfer_handshake_metadata: WorkerAddress | None = None

    def register_kv_caches(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Raises ValueError for a cache that cannot be sent block by block."""
        host = envs.VLLM_NIXL_SIDE_CHANNEL_HOST
        credentials = credentials_of(self._vllm_config)
        secret, tls = credentials.secret, new_tls(credentials.tls)
        pages = KVPages.of_cache(kv_caches, self._kv_cache_config)
        transport = transport_for(pages.device, host, timeout_s=self._timeout_s)
        layout = self._layout(pages)
        self._local = Local(
            engine_id=self._engine_id,
            secret=secret,
            tls=tls,
            rank=(get_pp_group().rank_in_group, get_tensor_model_parallel_rank()),
            layout=layout,
            pages=pages,
            transport=transport,
            timeout_s=self._timeout_s,
        )
        if self._is_prefill:
            self._server = PairServer(
                host,
                engine_id=self._engine_id,
                secret=secret,
                tls=tls,
                leases=self._leases,
                pages=pages,
                transport=transport,
                timeout_s=self._timeout_s,
            )
        port = None if self._server is None else self._server.port
        self.xfer_handshake_metadata = WorkerAddress(host=host, port=port, layout=layout)

    def set_host_xfer_buffer_ops(self, copy_operation: object) -> None:
        """Nothing is copied through the host."""

    def start_load_kv(self, metadata: Any) -> None:
        """Takes in what the scheduler wants of this step; returns at once."""
        for request_id, request in metadata.reqs_to_recv.items():
            lease_id = metadata.remote_lease_ids[request_id]
            self._fetch(request_id, request, _NO_LEASE if lease_id is None else lease_id)
        self._leases.admit(metadata.granted_lease_ids)
        self._leases.drop(metadata.reqs_not_processed)
        now_s = time.perf_counter()
        for request_id, expiry_s in metadata.reqs_to_send.items():
            # The scheduler's clock is another process's, it may be another host's.
            remaining_s = expiry_s - metadata.scheduler_clock
            self._leases.hold(request_id, expiry_s=now_s + remaining_s)
        for engine_id, beat in metadata.heartbeat_by_engine.items():
            remote = Remote(engine_id=engine_id, host=beat.host, port=beat.port)
            self._client(remote).submit(HeartbeatJob(remote_request_ids=tuple(beat.req_ids)))
        self._retire_unused_clients()

    def get_transfer_results(self) -> KVConnectorTransferResults:
        """What ended since the step before."""
        ended = self._leases.collect(now_s=time.perf_counter())
        for _ in ended.expired:
            self._stats.record_kv_expired_req()
        received: set[str] = set()
        failed: set[str] = set()
        while (outcome := self._next_outcome()) is not None:
            self._record(outcome)
            if isinstance(outcome.error, PairStuck) and outcome.job.has_blocks:
                # Its blocks may still be written to, whoever has them next: only the engine's end
                # helps, after which its requests go on elsewhere.
                raise outcome.error
            # With no blocks to fill nothing can be missing: prefill's lease ends by itself.
            if outcome.job.awaited:
                received.add(outcome.job.request_id)
                if outcome.error is not None and outcome.job.has_blocks:
                    failed.add(outcome.job.request_id)
        self._note_warm_ups()
        for engine_id, client in self._clients.items():
            if client.is_stuck:
                raise PairStuck(f"a read of engine {engine_id} does not end: this engine does")
        return KVConnectorTransferResults(
            finished_sending=set(ended.read_or_released | ended.expired),
            finished_recving=received,
            failed_recving=failed,
        )

    def get_finished(self) -> tuple[set[str], set[str]]:
        """vLLM's older name for it."""
        results = self.get_transfer_results()
        return results.finished_sending, results.finished_recving

    def get_block_ids_with_load_errors(self) -> set[int]:
        """None: vLLM is told of failed requests, which has a meaning for every cache layout."""
        return set()

    def get_kv_connector_stats(self) -> Any:
        return None if self._stats.is_empty() else self._stats.clone_and_reset()

    def release(self, request_ids: Iterable[str]) -> None:
        """Free these requests' blocks as if a decode had read them, at the next step."""
        self._leases.release(request_ids)

    def warm_up(
        self, engine_id: str, host: str, port: int, tp_size: int
    ) -> tuple[bool, str | None]:
        """Opens the pair with a prefill engine: (done, what keeps the pair apart).

        Returns at once. Where it is not done yet a step's stats tell the end of it, or a further
        call. `tp_size` is compared with the layout.
        """
        warm_up = self._warm_ups.get(engine_id)
        if warm_up is None:
            warm_up = self._warm_ups[engine_id] = Future()
            remote = Remote(engine_id=engine_id, host=host, port=port)
            self._client(remote).submit(WarmUpJob(done=warm_up))
        if not warm_up.done():
            return False, None
        return True, self._end_warm_up(engine_id)

    def _end_warm_up(self, engine_id: str) -> str | None:
        error = self._warm_ups.pop(engine_id).exception()
        return None if error is None else f"no KV from engine {engine_id}: {error}"

    def _note_warm_ups(self) -> None:
        ended = [engine_id for engine_id, warm_up in self._warm_ups.items() if warm_up.done()]
        for engine_id in ended:
            problem = self._end_warm_up(engine_id)
            worker = WarmedWorker(rank=get_world_group().rank_in_group, problem=problem)
            self._stats.record_warmed(engine_id, worker)

    def forget(self, engine_id: str) -> None:
        """That prefill engine is gone: what is asked of it already ends as it can."""
        self._warm_ups.pop(engine_id, None)
        if (client := self._clients.pop(engine_id, None)) is not None:
            client.stop()

    def shutdown(self) -> None:
        """Ends every pair; takes a second where a transfer does not end."""
        if self._server is not None:
            self._server.stop()
            self._server = None
        clients, self._clients = self._clients, {}
        for client in clients.values():
            client.stop()
        for client in clients.values():
            client.join(_STOP_S)

    def _fetch(self, request_id: str, request: Any, lease_id: int) -> None:
        remote = request.remote
        local_ids: BlockIds = request.local_block_ids
        job = FetchJob(
            request_id=request_id,
            remote_request_id=remote.request_id,
            lease_id=lease_id,
            local_block_ids=local_ids,
            remote_block_ids=_last_blocks(remote.block_ids, local_ids),
            awaited=request.awaiting_kvs,
        )
        address = Remote(engine_id=remote.engine_id, host=remote.host, port=remote.port)
        self._client(address).submit(job)

    def _client(self, remote: Remote) -> PairClient:
        assert self._local is not None, "no KV cache registered"
        if remote.engine_id not in self._clients:
            self._clients[remote.engine_id] = PairClient(self._local, remote, self._outcomes)
        return self._clients[remote.engine_id]

    def _retire_unused_clients(self) -> None:
        # An engine that is gone for good is never named again.
        unused_since_s = time.monotonic() - _UNUSED_PAIR_S
        for engine_id, client in list(self._clients.items()):
            if client.last_used_s < unused_since_s:
                client.stop()
                del self._clients[engine_id]

    def _next_outcome(self) -> Outcome | None:
        try:
            return self._outcomes.get_nowait()
        except queue.Empty:
            return None

    def _record(self, outcome: Outcome) -> None:
        if outcome.error is not None:
            self._stats.record_failed_transfer()
            self._stats.record_pair_failure(outcome.remote_engine_id)
            if isinstance(outcome.error, FetchRefused):
                self._stats.record_ended_lease(outcome.remote_engine_id)
        elif outcome.job.has_blocks:
            self._stats.remote_engine_id = outcome.remote_engine_id
            # As NIXL's telemetry would have it, in microseconds.
            self._stats.record_transfer(
                SimpleNamespace(
                    totalBytes=outcome.num_bytes,
                    xferDuration=outcome.seconds * 1e6,
                    postDuration=0.0,
                    descCount=sum(len(of_group) for of_group in outcome.job.local_block_ids),
                )
            )

    def _layout(self, pages: KVPages) -> KVLayout:
        config = self._vllm_config
        return KVLayout(
            wire_version=WIRE_VERSION,
            vllm_version=vllm_version,
            model=config.model_config.model,
            dtype=str(config.model_config.dtype),
            cache_dtype=str(config.cache_config.cache_dtype),
            block_size=config.cache_config.block_size,
            tensor_parallel_size=config.parallel_config.tensor_parallel_size,
            pipeline_parallel_size=config.parallel_config.pipeline_parallel_size,
            bytes_of_a_block=pages.page_bytes,
        )


def _last_blocks(remote_ids: BlockIds, local_ids: BlockIds) -> BlockIds:
    """Of each group, as many as decode lacks: it has the first ones cached."""
    return tuple(
        tuple(of_group[max(0, len(of_group) - len(wanted)) :])
        for of_group, wanted in zip(remote_ids, local_ids, strict=False)
    )
