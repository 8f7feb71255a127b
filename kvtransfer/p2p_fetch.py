"""Decode's end of a pair: one thread that fetches what the scheduler wants of one prefill engine.

Owns the connection and the group of its pair, from first use until they break or nobody uses them.
Never decides what to fetch, nor what becomes of a request whose fetch failed.
"""

import contextlib
import logging
import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass

from kvtransfer.p2p_errors import FetchRefused, PairBroken, PairError, PairTimeout
from kvtransfer.p2p_handshake import KVLayout, ask_address, check_same
from kvtransfer.p2p_link import Transport
from kvtransfer.p2p_pages import BlockIds, KVPages
from kvtransfer.p2p_stream import BlockStream
from kvtransfer.p2p_wire import (
    Connection,
    Fetch,
    Finished,
    Granted,
    Heartbeat,
    Hello,
    Refused,
    Welcome,
)
from kvtransfer.tls import Tls

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchJob:
    """Fill `local_block_ids`, in this order, with `remote_block_ids`; none: only say finished.

    `awaited` is whether the scheduler waits for an outcome.
    """

    request_id: str
    remote_request_id: str
    lease_id: int
    local_block_ids: BlockIds
    remote_block_ids: BlockIds
    awaited: bool

    @property
    def has_blocks(self) -> bool:
        return any(self.local_block_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeartbeatJob:
    """Keep these requests, named as prefill names them."""

    remote_request_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmUpJob:
    """Open the pair; `done` is told when it is, or why it is not."""

    done: Future[None]


Job = FetchJob | HeartbeatJob | WarmUpJob


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a fetch. `error` is None where every block is as prefill had it."""

    job: FetchJob
    remote_engine_id: str
    num_bytes: int
    seconds: float
    error: PairError | None


Outcomes = queue.SimpleQueue[Outcome]


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """What is the same for every pair of one decode worker."""

    engine_id: str
    secret: str
    tls: Tls | None = None
    rank: tuple[int, int]
    layout: KVLayout
    pages: KVPages
    transport: Transport
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """A prefill engine and its side channel."""

    engine_id: str
    host: str
    port: int


class _Pair:
    """An open pair: its connection and its group."""

    def __init__(self, connection: Connection, stream: BlockStream, timeout_s: float) -> None:
        self.connection, self._stream, self._timeout_s = connection, stream, timeout_s

    def fetch(self, job: FetchJob) -> int:
        ids = tuple(tuple(of_group) for of_group in job.remote_block_ids)
        if [len(of_group) for of_group in ids] != [
            len(of_group) for of_group in job.local_block_ids
        ]:
            # Both sides count what travels: one would wait for what the other never sends.
            raise FetchRefused("prefill has not as many blocks as decode lacks")
        self.connection.send(
            Fetch(request_id=job.remote_request_id, lease_id=job.lease_id, block_ids=ids)
        )
        match self.connection.receive(self._timeout_s):
            case Granted():
                return self._stream.receive(job.local_block_ids)
            case Refused(reason=reason):
                raise FetchRefused(reason)
            case answer:
                raise PairBroken(f"prefill answered a fetch with {type(answer).__name__}")

    @property
    def is_stuck(self) -> bool:
        return self._stream.is_stuck

    def close(self) -> None:
        # First the connection: prefill stops sending. Then the group: nothing is written after.
        self.connection.close()
        self._stream.close()


class PairClient:
    """One pair. Owns its thread, its jobs in order, and the pair while it is open."""

    def __init__(self, local: Local, remote: Remote, outcomes: Outcomes) -> None:
        self._local, self._remote, self._outcomes = local, remote, outcomes
        self._jobs: queue.SimpleQueue[tuple[float, Job] | None] = queue.SimpleQueue()
        self._pair: _Pair | None = None
        self._gave_up_s = float("-inf")
        self._gave_up_because: PairError | None = None
        self.last_used_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True, name="kv-fetch")
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Jobs are done in order. Each fetch that is awaited gets one outcome."""
        self.last_used_s = time.monotonic()
        self._jobs.put((self.last_used_s, job))

    def stop(self) -> None:
        """Ends the pair and the thread when the jobs submitted before are done."""
        self._jobs.put(None)

    @property
    def is_stuck(self) -> bool:
        """Whether its thread is lost in a transfer, and what was submitted will get no outcome."""
        pair = self._pair
        return pair is not None and pair.is_stuck

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            submitted_s, job = item
            try:
                match job:
                    case HeartbeatJob():
                        self._send_heartbeat(job)
                    case WarmUpJob():
                        self._warm_up(job)
                    case FetchJob():
                        self._settle(job, submitted_s)
            except Exception as error:
                # No request may wait for ever for an outcome.
                _log.exception("Fetching from %s", self._remote.engine_id)
                failure = self._close_after(error)
                if isinstance(job, FetchJob):
                    self._report(job, 0, 0.0, failure)
                elif isinstance(job, WarmUpJob):
                    job.done.set_exception(failure)
        self._close_after(None)

    def _close_after(self, error: Exception | None) -> PairError:
        """What to say of it: worst is a pair that cannot be closed."""
        try:
            self._close()
        except PairError as stuck:
            _log.error("The pair with %s: %s", self._remote.engine_id, stuck)
            return stuck
        return error if isinstance(error, PairError) else PairBroken(str(error))

    def _settle(self, job: FetchJob, submitted_s: float) -> None:
        begin_s = time.monotonic()
        try:
            num_bytes = self._try_twice(job, submitted_s)
        except PairError as error:
            _log.warning(
                "Request %s cannot be had from %s: %s",
                job.request_id, self._remote.engine_id, error,
            )  # fmt: skip
            self._report(job, 0, 0.0, error)
        else:
            self._report(job, num_bytes, time.monotonic() - begin_s, None)
            self._say_finished(job)

    def _try_twice(self, job: FetchJob, submitted_s: float) -> int:
        """Once more over a new group where the old one broke; not where prefill may hang."""
        if submitted_s <= self._gave_up_s and self._gave_up_because is not None:
            raise self._gave_up_because  # It stood behind the one that found out.
        for is_last in (False, True):
            was_open = self._pair is not None
            try:
                pair = self._open()
                return pair.fetch(job) if job.has_blocks else 0
            except FetchRefused:
                raise
            except PairError as error:
                self._close()
                if is_last or isinstance(error, PairTimeout) or not was_open:
                    self._gave_up_s, self._gave_up_because = time.monotonic(), error
                    raise
        raise AssertionError("not reached")

    def _say_finished(self, job: FetchJob) -> None:
        if self._pair is None:
            return
        try:
            self._pair.connection.send(
                Finished(request_id=job.remote_request_id, lease_id=job.lease_id)
            )
        except PairError as error:
            _log.info("Prefill frees %s when its lease ends: %s", job.remote_request_id, error)
            self._close()

    def _warm_up(self, job: WarmUpJob) -> None:
        try:
            if self._pair is not None and self._pair.connection.has_ended:
                self._close()
            self._open()
        except PairError as error:
            job.done.set_exception(error)
        else:
            job.done.set_result(None)

    def _send_heartbeat(self, job: HeartbeatJob) -> None:
        try:
            self._open().connection.send(Heartbeat(request_ids=job.remote_request_ids))
        except PairError as error:
            _log.info("No heartbeat to %s: %s", self._remote.engine_id, error)
            self._close()

    def _report(
        self, job: FetchJob, num_bytes: int, seconds: float, error: PairError | None
    ) -> None:
        self._outcomes.put(
            Outcome(
                job=job,
                remote_engine_id=self._remote.engine_id,
                num_bytes=num_bytes,
                seconds=seconds,
                error=error,
            )
        )

    def _open(self) -> _Pair:
        if self._pair is None:
            self._pair = _open_pair(self._local, self._remote)
        return self._pair

    def _close(self) -> None:
        pair, self._pair = self._pair, None
        if pair is not None:
            pair.close()


def _open_pair(local: Local, remote: Remote) -> _Pair:
    """Raises PairBroken, PairTimeout or PairMismatch."""
    address = ask_address(
        remote.host,
        remote.port,
        local.rank,
        engine_id=remote.engine_id,
        secret=local.secret,
        tls=local.tls,
        timeout_s=local.timeout_s,
    )
    check_same(local.layout, address.layout)
    with contextlib.ExitStack() as undo:
        connection = undo.enter_context(
            Connection.open(
                address.host,
                address.port or 0,
                local.timeout_s,
                name=local.engine_id,
                engine_id=remote.engine_id,
                secret=local.secret,
                tls=local.tls,
            )
        )
        connection.send(Hello(decode_engine_id=local.engine_id, prefill_engine_id=remote.engine_id))
        welcome = connection.receive(local.timeout_s)
        if not isinstance(welcome, Welcome):
            raise PairBroken(f"prefill opens no group: {welcome}")
        link = local.transport.join(address.host, welcome.address)
        undo.pop_all()
    return _Pair(connection, BlockStream(link, local.pages), local.timeout_s)
