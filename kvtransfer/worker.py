"""The connector's side beside the model: what prefill grants, what decode reads and believes.

Owns what differs from upstream's worker:

- a request that prefill keeps has a lease in a table that peers can read, and loses it before its
  blocks can become another's; decode believes no block before it has seen the lease after its read;
- of one peer so much is read at once, and the rest waits its turn; a slow read is waited for as
  long as its peer gives signs of life (`kvtransfer.pair_reads`);
- a read that fails is tried once more and then given up: the engine computes the blocks itself
  (`kv_load_failure_policy: recompute`);
- a handshake first compares layouts, and a peer that is gone is noticed at once;
- blocks that no decode will ever read are freed when told so, not when the lease ends;
- prefill's KV on a CPU is in memory that decodes on its host map and copy from;
- every transfer is counted under the pair of engines it ran between.

Never decides where a request goes.
"""

import logging
import os
import time
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import msgspec
from vllm.distributed import get_world_group
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import (
    NixlAgentMetadata,
    NixlConnectorMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
from vllm.platforms import current_platform

from kvtransfer.agent import SilentReads, replace_spinning_agent
from kvtransfer.block_read import BlockRead, Verdict
from kvtransfer.credentials import credentials_of
from kvtransfer.errors import NotShareable, PeerMismatch
from kvtransfer.handshake import PdHandshakePayload, fetch_payloads, layout_of
from kvtransfer.layout import mismatch
from kvtransfer.leases import LeaseRead, LeaseReader, LeaseTable, RemoteTable
from kvtransfer.memory_reads import MemoryReads
from kvtransfer.pair_reads import READ_TIMEOUT_S, PairReads, ReadLimits, Silence
from kvtransfer.shared_memory import SharedMemory, share
from kvtransfer.stats import PairStats, WarmedWorker
from kvtransfer.tls import new_tls

logger = logging.getLogger(__name__)

_LEASE_POLL_S = 0.0005
"""How long a step waits for the read of a lease, which takes microseconds, before the next does."""


class LeasedMetadata(NixlConnectorMetadata):  # type: ignore[misc]
    """Upstream's orders for one step, and the leases that belong to them."""

    def __init__(self, upstream: NixlConnectorMetadata) -> None:
        super().__init__()
        self.__dict__.update(upstream.__dict__)
        self.granted_lease_ids: dict[str, int] = {}
        self.remote_lease_ids: dict[str, int | None] = {}


class PdNixlWorker(NixlPullConnectorWorker):  # type: ignore[misc]
    """Beside the model. Owns the NIXL agent, the leases it granted and the reads under way."""

    nixl_wrapper: Any
    xfer_handshake_metadata: Any

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
        self.xfer_stats = PairStats()
        self.layout = layout_of(self)
        self._clock = time.perf_counter
        # As prefill.
        self._released: set[str] = set()
        self._leases = LeaseTable()
        self._granted: dict[str, int] = {}
        # As decode.
        self._lease_reader = LeaseReader()
        self._remote_tables: dict[str, dict[int, RemoteTable]] = {}
        self._remote_lease_ids: dict[str, int | None] = {}
        self._block_reads: dict[str, BlockRead] = {}
        self._read_limits = ReadLimits(
            timeout_s=float(
                self.kv_transfer_config.get_from_extra_config("read_timeout_s", READ_TIMEOUT_S)
            )
        )
        self._pairs: dict[str, PairReads[tuple[str, Any]]] = {}
        self._questions: dict[str, list[LeaseRead]] = {}
        """Reads by which silent peers are asked whether they are there."""
        self._reconnecting: set[str] = set()
        """Of the peers that are to be disconnected, those that are read again after that."""
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

    def _disconnect(self, engine_id: str) -> None:
        """Once no read of it is under way; until then new ones fail at once, later ones connect."""
        if engine_id in self._remote_agents:
            self._invalid_remote_engines.add(engine_id)

    def _reconnect(self, engine_id: str) -> None:
        """Once no read of it is under way; until then new ones wait."""
        self._disconnect(engine_id)
        self._reconnecting.add(engine_id)

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
        for payload in payloads.values():
            if payload.shared_memory is not None:
                self.nixl_wrapper.announce(payload.shared_memory)
        agents: dict[tuple[int, int], str] = {}
        for rank, payload in payloads.items():
            agent = msgspec.msgpack.decode(payload.agent_metadata_bytes, type=NixlAgentMetadata)
            self._validate_remote_parallel_config(agent)
            agents[0, rank] = self.add_remote_agent(agent, rank, remote_tp_size, agent.dcp_size)
        self._remote_tables[expected_engine_id] = {
            rank: RemoteTable(
                agent_name=agents[0, rank],
                address=payload.lease_table_address,
                num_slots=payload.num_lease_slots,
            )
            for rank, payload in payloads.items()
        }
        return agents, clock_offset_s

    def _check_peer(self, payload: PdHandshakePayload, engine_id: str) -> None:
        if payload.engine_id != engine_id:
            raise PeerMismatch(f"the KV engine is {payload.engine_id}, not {engine_id}")
        if (line := mismatch(prefill=payload.layout, decode=self.layout)) is not None:
            raise PeerMismatch(f"the KV of engine {engine_id} does not fit: {line}")
        if self.enforce_compat_hash and payload.compatibility_hash != self.compat_hash:
            raise PeerMismatch(f"vLLM says that the KV of engine {engine_id} does not fit")

    def _cleanup_remote_engine(self, engine_id: str, **how: Any) -> None:
        self._lease_reader.release(self.nixl_wrapper, self._warm_up_reads.pop(engine_id, []))
        self._lease_reader.release(self.nixl_wrapper, self._questions.pop(engine_id, []))
        self._reconnecting.discard(engine_id)
        if (pair := self._pairs.get(engine_id)) is not None:
            pair.reset()
        self._remote_tables.pop(engine_id, None)
        super()._cleanup_remote_engine(engine_id, **how)

    # As decode: reads.

    def _read_blocks_for_req(self, req_id: str, meta: Any) -> None:
        lease_id = self._remote_lease_ids.pop(req_id, None)
        if req_id in self._recving_metadata and req_id not in self._block_reads:
            self._block_reads[req_id] = BlockRead(
                lease_id=lease_id, remote_block_ids=meta.remote.block_ids
            )
        if self._must_wait(req_id, meta):
            self._pair_reads(meta.remote.engine_id).waiting.append((req_id, meta))
        else:
            super()._read_blocks_for_req(req_id, meta)

    def _must_wait(self, req_id: str, meta: Any) -> bool:
        engine_id = meta.remote.engine_id
        pair = self._pairs.get(engine_id)
        if pair is None or req_id not in self._block_reads or not any(meta.local_block_ids):
            return False
        return bool(pair.waiting) or not self._may_begin(engine_id, pair)

    def _may_begin(self, engine_id: str, pair: PairReads[Any]) -> bool:
        """Whether one more may be read now; also where that fails at once, or connects first."""
        if engine_id in self._reconnecting and engine_id in self._invalid_remote_engines:
            # Once nothing is read of it any more only other handshakes put off its end, or vLLM
            # itself wants a pause.
            return pair.is_idle and not self._handshake_futures
        return pair.has_room

    def _begin_reads(self) -> None:
        """Of those that wait for others of their peer, as many as there is room for, in order."""
        if self._reconnecting:
            self._cleanup_remote_engines()
        for engine_id, pair in list(self._pairs.items()):
            while pair.waiting and self._may_begin(engine_id, pair):
                super()._read_blocks_for_req(*pair.waiting.popleft())
            if pair.is_idle and not pair.waiting and engine_id not in self._remote_agents:
                del self._pairs[engine_id]

    def _pair_reads(self, engine_id: str) -> PairReads[tuple[str, Any]]:
        if engine_id not in self._pairs:
            self._pairs[engine_id] = PairReads(self._read_limits)
        return self._pairs[engine_id]

    def _read_blocks(self, *, request_id: str, read_spec: Any, **peer: Any) -> bool:
        before = self.nixl_wrapper.num_bytes_made
        posted = bool(super()._read_blocks(request_id=request_id, read_spec=read_spec, **peer))
        if posted and any(read_spec.local_block_ids):
            engine_id = peer["dst_engine_id"]
            num_bytes = self.nixl_wrapper.num_bytes_made - before
            self._pair_reads(engine_id).began(request_id, num_bytes, self._clock())
            self._block_reads[request_id].remote_ranks.add(read_spec.remote_rank)
            if not self._mixed_mem_types:  # There upstream itself holds the notification back.
                agent = self._remote_agents[engine_id][0, read_spec.remote_rank]
                notification = f"{peer['remote_request_id']}:{peer['expected_consumers']}".encode()
                self._pending_recv_notifs.setdefault(request_id, []).append((agent, notification))
        return posted

    def _pop_done_transfers(self, transfers: dict[str, list[Any]]) -> tuple[set[str], set[str]]:
        gone = self._gone_peers()
        done: set[str] = set()
        failed: set[str] = set()
        # One request at a time, so that what upstream records is known to be this pair's.
        for request_id, handles in list(transfers.items()):
            engine_id = self._recving_metadata[request_id].remote.engine_id
            rest = {request_id: handles}
            failed |= self._pop_done(request_id, engine_id, rest)
            if request_id in rest:
                if engine_id in gone:
                    rest[request_id] = self._given_up(request_id, rest[request_id], failed)
                transfers[request_id] = rest[request_id]
                continue
            if request_id in failed or request_id in self._recv_failures:
                verdict = Verdict.UNREADABLE
            else:
                verdict = self._verdict(request_id)
            if verdict is Verdict.OPEN and engine_id in gone:
                self._handle_failed_transfer(request_id, None)
                verdict = Verdict.UNREADABLE
            if verdict is Verdict.OPEN:
                transfers[request_id] = []
                continue
            del transfers[request_id]
            self._pair_reads(engine_id).ended(request_id)
            if verdict is Verdict.UNREADABLE and self._retry(request_id):
                failed.discard(request_id)
                continue
            done.add(request_id)
            if verdict is not Verdict.VALID:
                failed.add(request_id)
        return done, failed

    def _pop_done(self, request_id: str, engine_id: str, rest: dict[str, list[Any]]) -> set[str]:
        """As upstream's, and takes note of what has arrived."""
        self.xfer_stats.remote_engine_id = engine_id
        bytes_before, seconds_before = self.xfer_stats.moved(engine_id)
        _, failed = super()._pop_done_transfers(rest)
        num_bytes, seconds = self.xfer_stats.moved(engine_id)
        if num_bytes > bytes_before:
            self._pair_reads(engine_id).moved(
                request_id, num_bytes - bytes_before, seconds - seconds_before, self._clock()
            )
        newly_failed: set[str] = failed
        return newly_failed

    def _gone_peers(self) -> set[str]:
        """Those whose reads are given up. Asks silent ones for a sign of life."""
        gone: set[str] = set()
        for engine_id, pair in self._pairs.items():
            try:
                self._hear_answer(engine_id, pair)
                silence = pair.judge(self._clock())
                if silence is Silence.ASK:
                    self._ask(engine_id, pair)
            except Exception as error:
                # Whatever NIXL raises: the connection is no more.
                problem, silence = one_line(error), Silence.GONE
            else:
                problem = "it gives no sign of life"
            if silence is Silence.GONE:
                gone.add(engine_id)
                if engine_id not in self._reconnecting:
                    logger.warning("Reads of engine %s are given up: %s.", engine_id, problem)
                # Without the connection nothing arrives any more in blocks whose read was given up.
                self._reconnect(engine_id)
        return gone

    def _ask(self, engine_id: str, pair: PairReads[Any]) -> None:
        if engine_id not in self._questions:
            tables = list(self._remote_tables[engine_id].values())
            if not (reads := self._lease_reader.post(self.nixl_wrapper, tables, 0)):
                return  # No memory is left for it now.
            self._questions[engine_id] = reads
        pair.asked(self._clock())

    def _hear_answer(self, engine_id: str, pair: PairReads[Any]) -> None:
        if (reads := self._questions.get(engine_id)) is None:
            return
        if all(self._lease_reader.entry(self.nixl_wrapper, read) is not None for read in reads):
            self._lease_reader.release(self.nixl_wrapper, self._questions.pop(engine_id))
            pair.answered(self._clock())

    def _given_up(self, request_id: str, handles: list[Any], failed: set[str]) -> list[Any]:
        """The handles that still stand once those of a request were cancelled."""
        read = self._block_reads[request_id]
        if read.cancelled:
            return handles
        read.cancelled = True
        return [
            handle
            for handle in handles
            if not self._handle_failed_transfer(request_id, handle, failed)
        ]

    def _verdict(self, request_id: str) -> Verdict:
        """Of a request whose blocks are read: waits for a moment, not for as long as it takes."""
        read = self._block_reads.get(request_id)
        if read is None or not read.remote_ranks:
            return Verdict.VALID  # Nothing was read.
        engine_id = self._recving_metadata[request_id].remote.engine_id
        if read.lease_id is None:
            logger.warning("Request %s of engine %s names no lease.", request_id, engine_id)
            return Verdict.ENDED
        try:
            leases = self._read_leases(read, read.lease_id, engine_id)
        except Exception as error:
            self._log_failure("lease_unreadable", request_id, error=error)
            self._handle_failed_transfer(request_id, None)
            return Verdict.UNREADABLE
        if leases is None:
            return Verdict.OPEN
        if leases == {read.lease_id}:
            return Verdict.VALID
        logger.warning(
            "The lease of request %s ended before its blocks were read from engine %s.",
            request_id,
            engine_id,
        )
        self.xfer_stats.record_ended_lease(engine_id)
        return Verdict.ENDED

    def _read_leases(self, read: BlockRead, lease_id: int, engine_id: str) -> set[int] | None:
        """What stands in the slot on every rank that was read; None as long as one is open."""
        if not read.lease_reads:
            tables = [self._remote_tables[engine_id][rank] for rank in read.remote_ranks]
            read.lease_reads = self._lease_reader.post(self.nixl_wrapper, tables, lease_id)
            if not read.lease_reads:
                return None
        until_s = time.perf_counter() + _LEASE_POLL_S
        entries: set[int] = set()
        for lease_read in read.lease_reads:
            while (entry := self._lease_reader.entry(self.nixl_wrapper, lease_read)) is None:
                if time.perf_counter() > until_s:
                    return None
            entries.add(entry)
        return entries

    def _retry(self, request_id: str) -> bool:
        """Queues a second attempt, over a new connection: the old one does not heal."""
        read = self._block_reads[request_id]
        if read.retried:
            return False
        self._lease_reader.release(self.nixl_wrapper, read.lease_reads)
        read.begin_again()
        self._pending_recv_notifs.pop(request_id, None)
        self._recv_failures.discard(request_id)
        meta = self._recving_metadata[request_id]
        self._reconnect(meta.remote.engine_id)
        meta.remote = replace(meta.remote, block_ids=read.remote_block_ids)
        self._ready_requests.put((request_id, meta))
        return True

    def _forget_read(self, request_id: str) -> None:
        if (read := self._block_reads.pop(request_id, None)) is not None:
            self._lease_reader.release(self.nixl_wrapper, read.lease_reads)

    def _handle_failed_transfer(self, req_id: str, *args: Any, **kwargs: Any) -> bool:
        if (meta := self._recving_metadata.get(req_id)) is not None:
            self.xfer_stats.record_pair_failure(meta.remote.engine_id)
        return bool(super()._handle_failed_transfer(req_id, *args, **kwargs))


def one_line(error: BaseException) -> str:
    """An error as a reader of one line wants it."""
    return " ".join(str(error).split()) or type(error).__name__
