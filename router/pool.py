"""The live replicas of one pool as this router sees them: their connections, load, cache, cost.

Owns the connections to the pool's replicas and the ledger of what was sent to them. What a request
is, and what becomes of it when its replica goes, is the business of the core client.
"""

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
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
from router.cost_fit import CostFit, PoolCost, StepShape
from router.errors import CannotBeSent, NoReplica
from router.faults import Fault, fault_of
from router.ledger import Ledger
from router.policies import Policy, RoutePlan
from router.prefixes import PrefixIndex, index_block_size
from router.transfer_fit import Reads
from router.transfers import Handover, Transfers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolEvents:
    """Whom a pool tells what its replicas say."""

    opened: Callable[["Replica"], None]
    """It may get new work: it has joined, or does not leave after all."""
    stepped: Callable[["Replica", StepOutputs], None]
    taken: Callable[["Replica", str], None]
    rejected: Callable[["Replica", Rejection], None]
    gone: Callable[["Replica", str], None]


@dataclass(eq=False, slots=True)
class Replica:
    """One connected replica (an engine.channel.ReplicaOutputs)."""

    replica_id: str
    pool: "Pool"
    on_gone: Callable[["Replica"], None]
    on_unready: Callable[["Replica", str, str], None] = lambda *_: None
    """Of decode: it says of a prefill engine what keeps it from reading there, unasked."""
    node_id: str | None = None
    """Of Ray, where it is known."""
    end: ReplicaEnd | None = None
    facts: ReplicaFacts | None = None
    load: LoadReport = field(default_factory=LoadReport)
    warming: dict[str, asyncio.Future[str | None]] = field(default_factory=dict)
    """Answers that are awaited, by the prefill engine in question."""
    asked: deque[asyncio.Future[Holdings]] = field(default_factory=deque)
    """Answers about what it holds that are awaited, in the order in which they come."""
    reading: dict[str, float] = field(default_factory=dict)
    """Of decode: predicted seconds of the prompts that it reads itself, until their first token."""
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
    def reading_s(self) -> float:
        return sum(self.reading.values())

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

        `asks_load`: the replica says at once what else it has (`PoolEvents.taken`).

        Raises:
            CannotBeSent: it holds what no message can. Nothing was sent or noted then.
        """
        assert self.end is not None
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

    def settle(self, request_id: str, *, was_done: bool = True) -> None:
        """Takes a request off the ledger: it has ended here."""
        self.reading.pop(request_id, None)
        self.pool.ledger.settle(self.replica_id, request_id, was_done=was_done)

    def has(self, request_id: str) -> bool:
        """Whether a request was sent there and has not ended."""
        return self.pool.ledger.has(self.replica_id, request_id)

    def abort(self, request_id: str) -> None:
        assert self.end is not None
        self.settle(request_id, was_done=False)
        self.end.send(Kind.ABORT, [request_id])

    def clear(self, request_id: str) -> None:
        """Says that a request is a suspect no longer."""
        assert self.end is not None
        self.end.send(Kind.CLEAR, [request_id])

    def release(self, request_id: str) -> None:
        """Has KV blocks freed that were handed over and will not be pulled."""
        assert self.end is not None
        self.end.send(Kind.RELEASE, [request_id])

    async def warm_up(self, peer: KVPeer) -> str | None:
        """Has a decode engine make itself ready for a prefill engine; returns what keeps it from.

        Raises ChannelClosed where the replica goes before it has answered.
        """
        assert self.end is not None
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
        if self.end is None:
            return
        # A part of a long message is a sign of life as well.
        if now_s - max(self.heard_s, self.end.heard_s) > timeout_s:
            # Whatever made it hang: its requests are not taken for having killed it.
            self.is_silent = True
            self.end.close(f"nothing heard for {timeout_s:g} s")

    def ask_holdings(self) -> asyncio.Future[Holdings]:
        """Asks at once what the replica and its engine have; ChannelClosed where it goes."""
        assert self.end is not None
        answer: asyncio.Future[Holdings] = asyncio.get_running_loop().create_future()
        self.asked.append(answer)
        self.end.send(Kind.ASK_HOLDINGS, None)
        return answer

    # What the channel says (engine.channel.ReplicaOutputs).

    def step_received(self, step: StepOutputs) -> None:
        before = self._hear(step.load)
        self.pool.events.stepped(self, step)
        # After its outputs were seen: those that ended are off the ledger by now.
        self.pool.observe(self, before)

    def taken(self, taken: Taken) -> None:
        before = self._hear(taken.load)
        self.pool.observe(self, before)
        self.pool.events.taken(self, taken.request_id)

    def _hear(self, load: LoadReport) -> LoadReport:
        """Takes in a report; returns the one before it."""
        before, self.load = self.load, load
        self.heard_s = time.monotonic()
        if before.leaves_because != load.leaves_because:
            self.pool.leaving_changed(self)
        return before

    def rejected(self, rejection: Rejection) -> None:
        self.settle(rejection.request_id, was_done=False)
        if rejection.has_suspect:
            # Until it says otherwise, whosever that suspect is.
            self.load = msgspec.structs.replace(self.load, has_suspect=True)
        self.pool.events.rejected(self, rejection)

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


class Pool:
    """The connected replicas of one phase, and what this router knows of their work."""

    def __init__(
        self,
        name: str,
        policy: Policy,
        events: PoolEvents,
        *,
        num_routers: int = 1,
        transfers: Transfers | None = None,
    ) -> None:
        """`transfers`: shared with the other pool."""
        self.name = name
        self.events = events
        self.transfers = transfers or Transfers()
        self.ledger = Ledger(num_routers=num_routers, drains=name == "prefill")
        self.prefixes = PrefixIndex()
        self.block_size = 0
        """Tokens of a block of `prefixes`; 0 before the first replica."""
        self.num_dropped_tokens = 0
        """At the end of each prompt that a replica hands over; all of one pool are alike."""
        self._fit = CostFit()
        self._policy = policy
        self._replicas: dict[str, Replica] = {}
        self._rng = random.Random()

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._replicas.values())

    def __contains__(self, replica: Replica) -> bool:
        return self._replicas.get(replica.replica_id) is replica

    @property
    def cost(self) -> PoolCost:
        """The cost model, as fitted so far."""
        return self._fit.cost

    @property
    def is_open(self) -> bool:
        """Whether a replica may get new work."""
        return len(self.ledger) > 0

    def insert(self, replica: Replica) -> None:
        """A replica joins. Raises ChannelClosed where its connection has ended."""
        if replica.closed_because is not None:
            raise ChannelClosed(replica.closed_because)
        self._replicas[replica.replica_id] = replica
        replica.has_joined = True
        self.ledger.insert(replica.replica_id, time.monotonic())
        self.transfers.insert(replica.replica_id, replica.node_id)
        if replica.facts is not None:
            self.num_dropped_tokens = replica.facts.num_dropped_tokens
            self.block_size = index_block_size(replica.facts.block_size)
            num_tokens = replica.facts.num_kv_blocks * replica.facts.block_size
            self.prefixes.insert(replica.replica_id, num_tokens // self.block_size)
        self.observe(replica, LoadReport())
        logger.info("%s replica %s joined", self.name, replica.replica_id)
        if replica.is_leaving:
            self.ledger.close(replica.replica_id)
        else:
            self.events.opened(replica)

    def remove(self, replica: Replica, reason: str) -> None:
        if self._replicas.get(replica.replica_id) is replica:
            del self._replicas[replica.replica_id]
            self.ledger.remove(replica.replica_id)
            self.prefixes.remove(replica.replica_id)
            self.transfers.remove(replica.replica_id)
            logger.warning("%s replica %s left: %s", self.name, replica.replica_id, reason)
            self.events.gone(replica, reason)

    def leaving_changed(self, replica: Replica) -> None:
        """A replica leaves, or does not leave after all."""
        if self._replicas.get(replica.replica_id) is not replica:
            return
        if replica.is_leaving:
            self.ledger.close(replica.replica_id)
        elif self.ledger.reopen(replica.replica_id):
            self.events.opened(replica)

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

    def plan(
        self,
        request_s: float,
        cached: Mapping[str, tuple[int, float]] | None = None,
        *,
        barred: Set[str] = frozenset(),
        handover: Handover | None = None,
    ) -> RoutePlan:
        """The replica for a request, by the configured policy; arguments as in `Ledger.snapshot`.

        Raises:
            NoReplica: none may get new work, or only some that are `barred`.
        """
        if not self.ledger.has_open(barred):
            raise NoReplica(self.name)
        snapshot = self.ledger.snapshot(
            time.monotonic(),
            request_s=request_s,
            cached=cached,
            barred=barred,
            handover=handover,
        )
        return self._policy(snapshot, self._rng)

    def plan_handover(
        self,
        prefill: Replica,
        request_s: float,
        *,
        num_tokens: int,
        num_steps: int,
        barred: Set[str] = frozenset(),
    ) -> RoutePlan:
        """The replica for what another pool's replica has read. Raises NoReplica as `plan` does.

        `num_steps`: of the answer, which spreads over them what its KV takes to come.
        """
        return self.plan(
            request_s,
            barred=barred,
            handover=self._handover(prefill, num_tokens=num_tokens, num_steps=num_steps),
        )

    def _handover(self, prefill: Replica, *, num_tokens: int, num_steps: int) -> Handover | None:
        source, reader = prefill.facts, next((each.facts for each in self), None)
        if source is None or reader is None or source.kv_bytes_per_token is None:
            return None
        # All ranks of the side that has more of them read at once, each its part.
        num_ranks = max(source.kv.tp_size, reader.kv.tp_size)
        return self.transfers.handover(
            prefill.replica_id,
            num_bytes=num_tokens * source.kv_bytes_per_token / num_ranks,
            num_steps=num_steps,
            now_s=time.monotonic(),
        )

    def __getitem__(self, replica_id: str) -> Replica:
        return self._replicas[replica_id]

    def get(self, replica_id: str) -> Replica | None:
        """The replica, if it is connected."""
        return self._replicas.get(replica_id)

    def num_cached(self, chain: Sequence[int], num_tokens: int) -> dict[str, int]:
        """Tokens of a prompt that replicas are thought to have, the last one never among them.

        Without regard to `prefixes.trust`.
        """
        hits = self.prefixes.lookup(chain) if chain else {}
        most = num_tokens - 1
        return {key: min(most, blocks * self.block_size) for key, blocks in hits.items()}

    def plan_prefill(
        self, chain: Sequence[int], num_tokens: int, *, barred: Set[str] = frozenset()
    ) -> RoutePlan:
        """The replica for a prompt that is to be read. Raises NoReplica as `plan` does."""
        cost, trust = self.cost.prefill, self.prefixes.trust
        cached: dict[str, tuple[int, float]] = {}
        for replica_id, num_cached in self.num_cached(chain, num_tokens).items():
            num_uncached = num_tokens - int(trust * num_cached)
            seconds = cost.seconds(num_uncached=num_uncached, num_tokens=num_tokens)
            cached[replica_id] = (num_cached, seconds)
        request_s = cost.seconds(num_uncached=num_tokens, num_tokens=num_tokens)
        return self.plan(request_s, cached, barred=barred)
