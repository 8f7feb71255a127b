"""The connector's side beside the model: what prefill grants, and how decode comes to its peers.

Owns what differs from upstream's worker, but for decode's reads (`kvtransfer.reading`):

- a request that prefill keeps has a lease in a table that peers can read, and loses it before its
  blocks can become another's;
- a handshake first compares layouts, and a peer that is gone is noticed at once;
- blocks that no decode will ever read are freed when told so, not when the lease ends;
- prefill's KV on a CPU is in memory that decodes on its host map and copy from.

Never decides where a request goes.
"""

import logging
import os
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgspec
from vllm.distributed import get_world_group
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import (
    NixlAgentMetadata,
    NixlConnectorMetadata,
)
from vllm.platforms import current_platform

from kvtransfer.agent import SilentReads, replace_spinning_agent
from kvtransfer.credentials import credentials_of
from kvtransfer.errors import NotShareable, PeerMismatch
from kvtransfer.handshake import PdHandshakePayload, fetch_payloads, layout_of
from kvtransfer.layout import mismatch
from kvtransfer.leases import LeaseRead, LeaseTable, RemoteTable
from kvtransfer.memory_reads import MemoryReads
from kvtransfer.reading import ReadingWorker, one_line
from kvtransfer.shared_memory import SharedMemory, share
from kvtransfer.stats import WarmedWorker
from kvtransfer.tls import new_tls

logger = logging.getLogger(__name__)

_MOST_HANDSHAKES = 64
"""That wait for their peers' answers at a time, of which some may not come for seconds."""


class LeasedMetadata(NixlConnectorMetadata):  # type: ignore[misc]
    """Upstream's orders for one step, and the leases that belong to them."""

    def __init__(self, upstream: NixlConnectorMetadata) -> None:
        super().__init__()
        self.__dict__.update(upstream.__dict__)
        self.granted_lease_ids: dict[str, int] = {}
        self.remote_lease_ids: dict[str, int | None] = {}


class PdNixlWorker(ReadingWorker):
    """Beside the model. Owns the NIXL agent, the leases it granted and the warm-ups under way."""

    xfer_handshake_metadata: Any
    _handshake_futures: dict[str, Future[Any]]

    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        cores = os.sched_getaffinity(0)
        super().__init__(vllm_config, engine_id, kv_cache_config)
        credentials = credentials_of(vllm_config)
        self._secret, self._tls = credentials.secret, new_tls(credentials.tls)
        # On CPU upstream has pinned this thread, the model's, to the last core of each NUMA node:
        # the same one for every engine of the host.
        os.sched_setaffinity(0, cores)
        replace_spinning_agent(
            self.nixl_wrapper,
            self.device_type,
            self.kv_transfer_config.get_from_extra_config("progress_delay_us", None),
        )
        # Prefill may free a request as soon as it is told, so it is told after the lease was read.
        self.nixl_wrapper = MemoryReads(SilentReads(self.nixl_wrapper))
        self.layout = layout_of(self)
        # As prefill.
        self._released: set[str] = set()
        self._leases = LeaseTable()
        self._granted: dict[str, int] = {}
        # As decode.
        # Upstream has one thread for all, as NIXL takes no two peers at once.
        self._handshake_initiation_executor = ThreadPoolExecutor(
            _MOST_HANDSHAKES, thread_name_prefix="kv-handshake"
        )
        self._peers_change = threading.RLock()
        """Held while NIXL takes in a peer, or drops one."""
        self._warm_ups: dict[str, Future[Any]] = {}
        self._warm_up_reads: dict[str, list[LeaseRead]] = {}

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        shared_memory = self._shared_memory(kv_caches)
        # Before upstream asks the agent for what it tells peers.
        for regions in (self._leases.regions, self._lease_reader.regions):
            descriptors = self.nixl_wrapper.get_reg_descs(regions, "DRAM")
            self.nixl_wrapper.register_memory(descriptors, backends=self.nixl_backends)
            self._registered_descs.append(descriptors)
        super().register_kv_caches(kv_caches)
        upstream = self.xfer_handshake_metadata
        self.xfer_handshake_metadata = PdHandshakePayload(
            compatibility_hash=upstream.compatibility_hash,
            agent_metadata_bytes=upstream.agent_metadata_bytes,
            engine_id=self.engine_id,
            layout=self.layout,
            lease_table_address=self._leases.address,
            num_lease_slots=self._leases.num_slots,
            shared_memory=shared_memory,
        )

    def _shared_memory(self, kv_caches: dict[str, Any]) -> SharedMemory | None:
        wanted = self.kv_transfer_config.get_from_extra_config("shared_memory", "auto") == "auto"
        if not wanted or self.device_type != "cpu" or not self.kv_transfer_config.is_kv_producer:
            return None
        layers = self.vllm_config.compilation_config.static_forward_context
        views = [*kv_caches.values(), *(layers[name].kv_cache for name in kv_caches)]
        try:
            return share(views, self.nixl_wrapper.name)
        except NotShareable as reason:
            logger.warning("The KV cache is not in shared memory, NIXL reads it: %s.", reason)
            return None

    def start_load_kv(self, metadata: LeasedMetadata) -> None:
        for request_id, lease_id in metadata.granted_lease_ids.items():
            self._granted[request_id] = lease_id
            self._leases.grant(lease_id)
        self._remote_lease_ids.update(metadata.remote_lease_ids)
        self._begin_reads()
        super().start_load_kv(metadata)
        self._end_leases(metadata.reqs_not_processed)

    def get_transfer_results(self) -> Any:
        results = super().get_transfer_results()
        # The scheduler frees these blocks when it sees the results.
        self._end_leases(results.finished_sending)
        for request_id in results.finished_recving:
            self._forget_read(request_id)
        self._begin_reads()
        self._note_warm_ups()
        return results

    # As prefill.

    def release(self, request_ids: Iterable[str]) -> None:
        """Free these requests' blocks as if a decode had read them, at the next step."""
        self._released.update(request_ids)

    def _get_new_notifs(self) -> set[str]:
        sent: set[str] = super()._get_new_notifs()
        # A lease starts one step after its request ended; until then a release waits here.
        for request_id in self._released & self._reqs_to_send.keys():
            del self._reqs_to_send[request_id]
            self._reqs_to_process.discard(request_id)
            sent.add(request_id)
        self._released &= self._reqs_to_process
        return sent

    def _end_leases(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            if (lease_id := self._granted.pop(request_id, None)) is not None:
                self._leases.end(lease_id)

    # As decode: peers.

    def warm_up(
        self, engine_id: str, host: str, port: int, tp_size: int
    ) -> tuple[bool, str | None]:
        """Makes a prefill engine ready to be read: (done, what keeps the pair apart).

        Returns at once. Where it is not done yet it goes on with every step, whose stats tell the
        end of it, and with every further call.
        """
        if engine_id not in self._warm_ups and engine_id not in self._warm_up_reads:
            self._cleanup_remote_engines()
            handshake = self._ensure_handshake(engine_id, host, port, tp_size)
            if handshake is not None:
                self._warm_ups[engine_id] = handshake
        return self._go_on_warming_up(engine_id)

    def _note_warm_ups(self) -> None:
        for engine_id in self._warm_ups.keys() | self._warm_up_reads.keys():
            done, problem = self._go_on_warming_up(engine_id)
            if done:
                worker = WarmedWorker(rank=get_world_group().rank_in_group, problem=problem)
                self.xfer_stats.record_warmed(engine_id, worker)

    def _go_on_warming_up(self, engine_id: str) -> tuple[bool, str | None]:
        if (handshake := self._warm_ups.get(engine_id)) is not None:
            if not handshake.done():
                return False, None
            if (error := handshake.exception()) is not None:
                del self._warm_ups[engine_id]
                return True, one_line(error)
        with self._handshake_lock:
            if engine_id not in self._remote_agents:
                return False, None  # Done, but upstream's callback has not noted it yet.
        self._warm_ups.pop(engine_id, None)
        return self._warm_up_connection(engine_id)

    def _warm_up_connection(self, engine_id: str) -> tuple[bool, str | None]:
        """NIXL connects with the first read: any entry of the peer's tables will do."""
        reads = self._warm_up_reads.get(engine_id)
        try:
            if reads is None:
                tables = list(self._remote_tables[engine_id].values())
                reads = self._lease_reader.post(self.nixl_wrapper, tables, 0)
                self._warm_up_reads[engine_id] = reads
            if any(self._lease_reader.entry(self.nixl_wrapper, read) is None for read in reads):
                return False, None
            problem = None
        except Exception as error:
            # Whatever NIXL raises, the pair is not ready.
            problem = f"the KV of engine {engine_id} cannot be read: {one_line(error)}"
            self._disconnect(engine_id)
        self._lease_reader.release(self.nixl_wrapper, self._warm_up_reads.pop(engine_id, []))
        self._engine_last_active[engine_id] = time.perf_counter()
        return True, problem

    def forget(self, engine_id: str) -> None:
        """An engine that is gone: new reads of it fail at once, and the rest ends with the last."""
        self._warm_ups.pop(engine_id, None)
        self._disconnect(engine_id)
        self._reconnecting.discard(engine_id)
        self._cleanup_remote_engines()

    def _nixl_handshake(
        self,
        host: str,
        port: int,
        remote_tp_size: int,
        expected_engine_id: str,
        remote_dcp_size: int = 1,
        *more: Any,
    ) -> Any:
        """As upstream's, over our side channel: who answers is a member, and that engine."""
        if self._is_csa_linear:
            self._validate_csa_linear_tp_layout(remote_tp_size)
        if not self.use_host_buffer:
            # This runs in a thread of its own, in which UCX finds no device that was not set there.
            current_platform.set_device(self.device_id)
        ranks = self.transfer_topo.handshake_target_ranks(remote_tp_size, remote_dcp_size)
        payloads, clock_offset_s = fetch_payloads(
            host,
            port,
            ranks,
            engine_id=expected_engine_id,
            secret=self._secret,
            tls=self._tls,
        )
        for payload in payloads.values():
            self._check_peer(payload, expected_engine_id)
        with self._peers_change:
            return self._load(expected_engine_id, payloads, remote_tp_size), clock_offset_s

    def _load(
        self, engine_id: str, payloads: dict[int, PdHandshakePayload], tp_size: int
    ) -> dict[tuple[int, int], str]:
        """Makes a peer's workers known to NIXL, by the names that are returned."""
        for payload in payloads.values():
            if payload.shared_memory is not None:
                self.nixl_wrapper.announce(payload.shared_memory)
        agents: dict[tuple[int, int], str] = {}
        for rank, payload in payloads.items():
            agent = msgspec.msgpack.decode(payload.agent_metadata_bytes, type=NixlAgentMetadata)
            self._validate_remote_parallel_config(agent)
            agents[0, rank] = self.add_remote_agent(agent, rank, tp_size, agent.dcp_size)
        self._remote_tables[engine_id] = {
            rank: RemoteTable(
                agent_name=agents[0, rank],
                address=payload.lease_table_address,
                num_slots=payload.num_lease_slots,
            )
            for rank, payload in payloads.items()
        }
        return agents

    def _check_peer(self, payload: PdHandshakePayload, engine_id: str) -> None:
        if payload.engine_id != engine_id:
            raise PeerMismatch(f"the KV engine is {payload.engine_id}, not {engine_id}")
        if (line := mismatch(prefill=payload.layout, decode=self.layout)) is not None:
            raise PeerMismatch(f"the KV of engine {engine_id} does not fit: {line}")
        if self.enforce_compat_hash and payload.compatibility_hash != self.compat_hash:
            raise PeerMismatch(f"vLLM says that the KV of engine {engine_id} does not fit")

    def _cleanup_remote_engines(self) -> None:
        """As upstream's, but beside handshakes whose peer has yet to answer."""
        if not self._peers_change.acquire(blocking=False):
            return  # At the next look: NIXL takes in a peer.
        try:
            # Handshakes that end meanwhile are noted under this lock.
            with self._handshake_lock:
                under_way, self._handshake_futures = self._handshake_futures, {}
                try:
                    super()._cleanup_remote_engines()
                finally:
                    self._handshake_futures = under_way
        finally:
            self._peers_change.release()

    def _cleanup_remote_engine(self, engine_id: str, **how: Any) -> None:
        self._lease_reader.release(self.nixl_wrapper, self._warm_up_reads.pop(engine_id, []))
        with self._peers_change:
            super()._cleanup_remote_engine(engine_id, **how)
