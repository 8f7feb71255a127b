"""The live replicas of one pool as this router sees them: their connections, load, cache, cost.

Owns the connections to the pool's replicas; what is known of them, and where requests go by it, is
`router.planner`'s. What a request is, and what becomes of it when its replica goes, is the business
of those who subscribe.
"""

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec
from vllm.v1.engine import EngineCoreRequest

from engine.channel import ReplicaEnd
from engine.errors import ChannelClosed
from engine.exit_cause import EngineExit
from engine.wire import (
    AddRequest,
    Holdings,
    Kind,
    LoadReport,
    Rejection,
    ReplicaFacts,
    StepOutputs,
    Taken,
    Transferred,
    Warmed,
)
from kvtransfer.peers import KVPeer
from kvtransfer.phase import Phase
from router.cost_fit import StepShape
from router.errors import CannotBeSent
from router.faults import Fault, fault_of
from router.planner import PoolPlanner
from router.policies import Policy
from router.prefixes import index_block_size
from router.transfer_fit import Reads
from router.transfers import Transfers

logger = logging.getLogger(__name__)


def _nothing(*_: object) -> None:
    """Of an event that a subscriber does not follow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolEvents:
    """What a subscriber does with what a pool's replicas say."""

    opened: Callable[["Replica"], None] = _nothing
    """It may get new work: it has joined, or does not leave after all."""
    stepped: Callable[["Replica", StepOutputs], None] = _nothing
    acknowledged: Callable[["Replica", str], None] = _nothing
    """It has a request, and has said what else it has."""
    rejected: Callable[["Replica", Rejection], None] = _nothing
    gone: Callable[["Replica"], None] = _nothing


@dataclass(eq=False, slots=True)
class Replica:
    """One connected replica (an engine.channel.ReplicaOutputs)."""

    replica_id: str
    pool: "Pool"
    end: ReplicaEnd
    facts: ReplicaFacts
    on_gone: Callable[["Replica"], None]
    on_unready: Callable[["Replica", str, str], None] = lambda *_: None
    """Of decode: it says of a prefill engine what keeps it from reading there, unasked."""
    node_id: str | None = None
    """Of Ray, where it is known."""
    load: LoadReport = field(default_factory=LoadReport)
    warming: dict[str, asyncio.Future[str | None]] = field(default_factory=dict)
    """Answers that are awaited, by the prefill engine in question."""
    asked: deque[asyncio.Future[Holdings]] = field(default_factory=deque)
    """Answers about what it holds that are awaited, in the order in which they come."""
    prefilling: dict[str, float] = field(default_factory=dict)
    """Of decode: predicted seconds of the prompts that it prefills, until their first token."""
    has_joined: bool = False
    """It was in the pool, and may be no longer."""
    exit: EngineExit | None = None
    """How its engine ended, where it could say so."""
    is_unlisted: bool = False
    """Serve no longer lists it."""
    is_silent: bool = False
    """Nothing was heard of it for the stall timeout."""
    is_node_dead: bool = False
    """Ray says that its node is dead."""
    closed_because: str | None = None
    """Why the connection has ended; None while it has not."""
    heard_s: float = field(default_factory=time.monotonic)
    joined_s: float = field(default_factory=time.monotonic)

    @property
    def is_leaving(self) -> bool:
        """It finishes what it has and gets nothing new."""
        return self.is_unlisted or self.fault is not None or bool(self.load.leaves_because)

    @property
    def fault(self) -> Fault | None:
        """What has gone wrong with it; None where nothing has, or it left in an orderly way."""
        return fault_of(
            engine_exit=self.exit,
            is_node_dead=self.is_node_dead,
            is_silent=self.is_silent,
            leaves_because=self.load.leaves_because,
            is_unlisted=self.is_unlisted,
            closed_because=self.closed_because,
        )

    @property
    def work_s(self) -> float:
        return self.pool.ledger.work_s(self.replica_id)

    @property
    def prefilling_s(self) -> float:
        return sum(self.prefilling.values())

    @property
    def kv_bytes_per_token(self) -> float | None:
        """None where it is not known."""
        return self.facts.kv_bytes_per_token

    @property
    def num_ranks(self) -> int:
        """Of its engine: each has a part of the KV."""
        return self.facts.kv.tp_size

    def set_listed(self, is_listed: bool) -> None:
        """Serve lists it, or does no longer."""
        self.is_unlisted = not is_listed
        self.pool.leaving_changed(self)

    def add(
        self,
        request: EngineCoreRequest,
        work_s: float,
        *,
        deadline_s: float | None = None,
        asks_load: bool = False,
        is_suspect: bool = False,
    ) -> None:
        """Sends a request, which gives way to others after `deadline_s`, of the monotonic clock.

        `asks_load`: the replica says at once what else it has (`PoolEvents.acknowledged`).

        Raises:
            CannotBeSent: it holds what no message can. Nothing was sent or noted then.
        """
        try:
            self.end.send(Kind.ADD, AddRequest(request, work_s, asks_load, is_suspect))
        except Exception as error:
            # Encoders raise whatever they like: what is in the request decides.
            raise CannotBeSent(error) from error
        self.pool.ledger.add(
            self.replica_id,
            request.request_id,
            work_s,
            now_s=time.monotonic(),
            deadline_s=deadline_s,
        )

    def complete(self, request_id: str, *, was_done: bool = True) -> None:
        """Takes a request off the ledger: it has ended here."""
        self.prefilling.pop(request_id, None)
        self.pool.ledger.complete(self.replica_id, request_id, was_done=was_done)

    def has(self, request_id: str) -> bool:
        """Whether a request was sent there and has not ended."""
        return self.pool.ledger.has(self.replica_id, request_id)

    def abort(self, request_id: str) -> None:
        self.complete(request_id, was_done=False)
        self.end.send(Kind.ABORT, [request_id])

    def clear(self, request_id: str) -> None:
        """Says that a request is a suspect no longer."""
        self.end.send(Kind.CLEAR, [request_id])

    def release(self, request_id: str) -> None:
        """Has KV blocks freed that are kept for decode and will not be pulled."""
        self.end.send(Kind.RELEASE, [request_id])

    async def warm_up(self, peer: KVPeer) -> str | None:
        """Has a decode engine make itself ready for a prefill engine; returns what keeps it from.

        Raises ChannelClosed where the replica goes before it has answered.
        """
        answer: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self.warming[peer.engine_id] = answer
        self.end.send(Kind.WARM_UP, peer)
        try:
            return await answer
        finally:
            if self.warming.get(peer.engine_id) is answer:
                del self.warming[peer.engine_id]

    def end_if_silent(self, *, now_s: float, timeout_s: float) -> None:
        """Ends the connection if nothing has come on it for `timeout_s`: the replica hangs."""
        # A part of a long message is a sign of life as well.
        if now_s - max(self.heard_s, self.end.heard_s) > timeout_s:
            # Whatever made it hang: its requests are not taken for having killed it.
            self.is_silent = True
            self.end.close(f"nothing heard for {timeout_s:g} s")

    def ask_holdings(self) -> asyncio.Future[Holdings]:
        """Asks at once what the replica and its engine have; ChannelClosed where it goes."""
        answer: asyncio.Future[Holdings] = asyncio.get_running_loop().create_future()
        self.asked.append(answer)
        self.end.send(Kind.ASK_HOLDINGS, None)
        return answer

    # What the channel says (engine.channel.ReplicaOutputs).

    def step_received(self, step: StepOutputs) -> None:
        before = self._hear(step.load)
        for each in self.pool.subscribers:
            each.stepped(self, step)
        # After its outputs were seen: those that ended are off the ledger by now.
        self.pool.observe(self, before)

    def taken(self, taken: Taken) -> None:
        before = self._hear(taken.load)
        self.pool.observe(self, before)
        for each in self.pool.subscribers:
            each.acknowledged(self, taken.request_id)

    def _hear(self, load: LoadReport) -> LoadReport:
        """Takes in a report; returns the one before it."""
        before, self.load = self.load, load
        self.heard_s = time.monotonic()
        if before.leaves_because != load.leaves_because:
            self.pool.leaving_changed(self)
        return before

    def rejected(self, rejection: Rejection) -> None:
        self.complete(rejection.request_id, was_done=False)
        if rejection.has_suspect:
            # Until it says otherwise, whosever that suspect is.
            self.load = msgspec.structs.replace(self.load, has_suspect=True)
        for each in self.pool.subscribers:
            each.rejected(self, rejection)

    def warmed(self, warmed: Warmed) -> None:
        answer = self.warming.pop(warmed.engine_id, None)
        if answer is not None and not answer.done():
            answer.set_result(warmed.problem)
        elif warmed.problem is not None:
            self.on_unready(self, warmed.engine_id, warmed.problem)

    def holds(self, holdings: Holdings) -> None:
        if self.asked and not (answer := self.asked.popleft()).done():
            answer.set_result(holdings)

    def transferred(self, moved: list[Transferred]) -> None:
        now_s = time.monotonic()
        for each in moved:
            reads = Reads(num=each.num_reads, num_bytes=each.num_bytes, seconds=each.seconds)
            self.pool.transfers.observe(
                reads, prefill=each.engine_id, decode=self.replica_id, now_s=now_s
            )

    def engine_ended(self, how: EngineExit) -> None:
        self.exit = how
        self.pool.leaving_changed(self)

    def replica_gone(self, reason: str) -> None:
        self.closed_because = reason
        for answer in self.warming.values():
            if not answer.done():
                answer.set_exception(ChannelClosed(reason))
        for asked in self.asked:
            if not asked.done():
                asked.set_exception(ChannelClosed(reason))
        self.asked.clear()
        self.pool.remove(self, reason)
        self.on_gone(self)


class Pool(PoolPlanner):
    """The connected replicas of one phase, and what this router knows of their work."""

    def __init__(
        self,
        name: Phase,
        policy: Policy,
        *,
        num_routers: int = 1,
        transfers: Transfers | None = None,
    ) -> None:
        """`transfers`: shared with the other pool."""
        super().__init__(
            name,
            policy,
            random.Random(),
            time.monotonic,
            num_routers=num_routers,
            transfers=transfers,
        )
        self.subscribers: list[PoolEvents] = []
        self.num_dropped_tokens = 0
        """At the end of each prompt whose KV a replica transfers; all of one pool are alike."""
        self._replicas: dict[str, Replica] = {}

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._replicas.values())

    def __contains__(self, replica: Replica) -> bool:
        return self._replicas.get(replica.replica_id) is replica

    def subscribe(self, events: PoolEvents) -> None:
        """Has somebody told what replicas say, after those who came before."""
        self.subscribers.append(events)

    def insert(self, replica: Replica) -> None:
        """A replica joins. Raises ChannelClosed where its connection has ended."""
        if replica.closed_because is not None:
            raise ChannelClosed(replica.closed_because)
        self._replicas[replica.replica_id] = replica
        replica.has_joined = True
        self.joined(replica.replica_id, replica.node_id)
        facts = replica.facts
        self.num_dropped_tokens = facts.num_dropped_tokens
        self.block_size = index_block_size(facts.block_size)
        num_tokens = facts.num_kv_blocks * facts.block_size
        self.prefixes.insert(replica.replica_id, num_tokens // self.block_size)
        self.observe(replica, LoadReport())
        logger.info("%s replica %s joined", self.name, replica.replica_id)
        if replica.is_leaving:
            self.ledger.close(replica.replica_id)
        else:
            self._opened(replica)

    def remove(self, replica: Replica, reason: str) -> None:
        if self._replicas.get(replica.replica_id) is replica:
            del self._replicas[replica.replica_id]
            self.left(replica.replica_id)
            logger.warning("%s replica %s left: %s", self.name, replica.replica_id, reason)
            for each in self.subscribers:
                each.gone(replica)

    def leaving_changed(self, replica: Replica) -> None:
        """A replica leaves, or does not leave after all."""
        if self._replicas.get(replica.replica_id) is not replica:
            return
        if replica.is_leaving:
            self.ledger.close(replica.replica_id)
        elif self.ledger.reopen(replica.replica_id):
            self._opened(replica)

    def _opened(self, replica: Replica) -> None:
        for each in self.subscribers:
            each.opened(replica)

    def observe(self, replica: Replica, before: LoadReport) -> None:
        """Takes in what a replica has reported last."""
        load, step = replica.load, replica.load.step
        self.ledger.report(
            replica.replica_id,
            others_work_s=load.others_work_s,
            progress_s=load.progress_s,
            now_s=replica.heard_s,
        )
        if step is not None and step != before.step:
            shape = StepShape(
                num_prefill_tokens=step.num_prefill_tokens,
                prefill_attention=step.prefill_attention,
                num_decodes=step.num_decodes,
                num_context_tokens=step.num_context_tokens,
            )
            self._fit.observe(shape, step.seconds)

    def __getitem__(self, replica_id: str) -> Replica:
        return self._replicas[replica_id]

    def get(self, replica_id: str) -> Replica | None:
        """The replica, if it is connected."""
        return self._replicas.get(replica_id)
