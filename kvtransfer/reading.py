"""Decode's reads beside the model: when they begin, what becomes of them, and what they are worth.

Owns what differs from upstream's worker:

- decode believes no block before it has seen the request's lease after its read;
- of one peer so much is read at once, and the rest waits its turn; a slow read is waited for as
  long as its peer gives signs of life (`kvtransfer.pair_reads`);
- a read that fails is tried once more, over a new connection, and then given up: the engine
  computes the blocks itself (`kv_load_failure_policy: recompute`);
- every transfer is counted under the pair of engines it ran between.

Never decides where a request goes.
"""

import logging
import time
from dataclasses import replace
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker

from kvtransfer.block_read import BlockRead, Verdict
from kvtransfer.leases import LeaseRead, LeaseReader, RemoteTable
from kvtransfer.pair_reads import READ_TIMEOUT_S, PairReads, ReadLimits, Silence
from kvtransfer.stats import PairStats

logger = logging.getLogger(__name__)

_LEASE_POLL_S = 0.0005
"""How long a step waits for the read of a lease, which takes microseconds, before the next does."""


class ReadingWorker(NixlPullConnectorWorker):  # type: ignore[misc]
    """The half of `kvtransfer.worker` that reads. Owns the reads under way, and those that wait."""

    nixl_wrapper: Any
    """A `MemoryReads`."""

    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        self.xfer_stats = PairStats()
        self._clock = time.perf_counter
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

    def _disconnect(self, engine_id: str) -> None:
        """Once no read of it is under way; until then new ones fail at once, later ones connect."""
        if engine_id in self._remote_agents:
            self._invalid_remote_engines.add(engine_id)

    def _reconnect(self, engine_id: str) -> None:
        """Once no read of it is under way; until then new ones wait."""
        self._disconnect(engine_id)
        self._reconnecting.add(engine_id)

    def _cleanup_remote_engine(self, engine_id: str, **how: Any) -> None:
        self._lease_reader.release(self.nixl_wrapper, self._questions.pop(engine_id, []))
        self._reconnecting.discard(engine_id)
        if (pair := self._pairs.get(engine_id)) is not None:
            pair.reset()
        self._remote_tables.pop(engine_id, None)
        super()._cleanup_remote_engine(engine_id, **how)

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
            # It is dropped as soon as nothing is read of it any more, unless vLLM wants a pause.
            _, pause_until_s = self._invalid_engine_backoff.get(engine_id, (0.0, 0.0))
            return pair.is_idle and pause_until_s > time.perf_counter()
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
                if engine_id in gone or self._block_reads[request_id].given_up:
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
        """Cancels a request's reads: the handles that still stand. They are cancelled again."""
        self._block_reads[request_id].given_up = True
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

    # A read that has failed is looked at until nothing of it stands: counted and logged once.

    def _handle_failed_transfer(
        self,
        req_id: str,
        handle: Any,
        failed_req_ids: set[str] | None = None,
        record_failed_transfer: bool = True,
    ) -> bool:
        is_new = req_id not in self._recv_failures and req_id not in (failed_req_ids or ())
        if is_new and (meta := self._recving_metadata.get(req_id)) is not None:
            self.xfer_stats.record_pair_failure(meta.remote.engine_id)
        return bool(
            super()._handle_failed_transfer(
                req_id, handle, failed_req_ids, record_failed_transfer and is_new
            )
        )

    def _log_failure(
        self, failure_type: str, req_id: str | None, *args: Any, **context: Any
    ) -> None:
        if req_id not in self._recv_failures:
            super()._log_failure(failure_type, req_id, *args, **context)


def one_line(error: BaseException) -> str:
    """An error as a reader of one line wants it."""
    return " ".join(str(error).split()) or type(error).__name__
