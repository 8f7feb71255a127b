"""The live replicas of one pool as this router sees them, and the ledger of what it sent them.

Owns the connections to the pool's replicas. What a request is, and what becomes of it when its
replica goes, is the business of the core client.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from vllm.v1.engine import EngineCoreRequest

from engine.channel import ReplicaEnd
from engine.errors import ChannelClosed
from engine.wire import (
    AddRequest,
    Kind,
    LoadReport,
    Rejection,
    ReplicaFacts,
    StepOutputs,
    Warmed,
)
from kvtransfer.peers import KVPeer
from router.errors import NoReplica
from router.policies import Policy, PoolSnapshot, ReplicaLoad

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolEvents:
    """Whom a pool tells what its replicas say."""

    joined: Callable[["Replica"], None]
    stepped: Callable[["Replica", StepOutputs], None]
    rejected: Callable[["Replica", Rejection], None]
    gone: Callable[["Replica", str], None]


@dataclass(eq=False, slots=True)
class Replica:
    """One connected replica (an engine.channel.ReplicaOutputs). Owns its line of the ledger."""

    replica_id: str
    pool: "Pool"
    on_gone: Callable[["Replica"], None]
    end: ReplicaEnd | None = None
    facts: ReplicaFacts | None = None
    load: LoadReport = field(default_factory=LoadReport)
    sent: dict[str, float] = field(default_factory=dict)
    """Predicted seconds of what this router sent and has not seen end, by request id."""
    sent_work_s: float = 0.0
    warming: dict[str, asyncio.Future[str | None]] = field(default_factory=dict)
    """Answers that are awaited, by the prefill engine in question."""
    is_unlisted: bool = False
    """Serve no longer lists it."""
    heard_s: float = field(default_factory=time.monotonic)

    @property
    def is_leaving(self) -> bool:
        """It finishes what it has and gets nothing new."""
        return self.is_unlisted or bool(self.load.leaves_because)

    @property
    def has_one_request(self) -> bool:
        """Whether it has one request at most, of this router or another."""
        return len(self.sent) <= 1 and self.load.num_running + self.load.num_waiting <= 1

    @property
    def work_s(self) -> float:
        return self.sent_work_s + self.load.others_work_s

    def add(self, request: EngineCoreRequest, work_s: float) -> None:
        assert self.end is not None
        self.sent[request.request_id] = work_s
        self.sent_work_s += work_s
        self.end.send(Kind.ADD, AddRequest(request, work_s))

    def settle(self, request_id: str) -> None:
        """Takes a request off the ledger: it has ended here."""
        self.sent_work_s -= self.sent.pop(request_id, 0.0)
        if not self.sent:
            self.sent_work_s = 0.0  # floats do not quite add up to nothing

    def abort(self, request_id: str) -> None:
        assert self.end is not None
        self.settle(request_id)
        self.end.send(Kind.ABORT, [request_id])

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
        return await answer

    # What the channel says (engine.channel.ReplicaOutputs).

    def step_received(self, step: StepOutputs) -> None:
        self.load = step.load
        self.heard_s = time.monotonic()
        self.pool.events.stepped(self, step)

    def rejected(self, rejection: Rejection) -> None:
        self.settle(rejection.request_id)
        self.pool.events.rejected(self, rejection)

    def warmed(self, warmed: Warmed) -> None:
        answer = self.warming.pop(warmed.engine_id, None)
        if answer is not None and not answer.done():
            answer.set_result(warmed.problem)

    def replica_gone(self, reason: str) -> None:
        for answer in self.warming.values():
            if not answer.done():
                answer.set_exception(ChannelClosed(reason))
        self.pool.remove(self, reason)
        self.on_gone(self)


class Pool:
    """The connected replicas of one phase."""

    def __init__(self, name: str, policy: Policy, events: PoolEvents) -> None:
        self.name = name
        self.events = events
        self._policy = policy
        self._replicas: dict[str, Replica] = {}
        self._turn = 0
        self._rng = random.Random()

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._replicas.values())

    @property
    def candidates(self) -> list[Replica]:
        """The replicas that may get new work."""
        return [replica for replica in self._replicas.values() if not replica.is_leaving]

    def insert(self, replica: Replica) -> None:
        self._replicas[replica.replica_id] = replica
        logger.info("%s replica %s joined", self.name, replica.replica_id)
        self.events.joined(replica)

    def remove(self, replica: Replica, reason: str) -> None:
        if self._replicas.pop(replica.replica_id, None) is not None:
            logger.warning("%s replica %s left: %s", self.name, replica.replica_id, reason)
            self.events.gone(replica, reason)

    def pick(self) -> Replica:
        """The replica for the next request, by the configured policy.

        Raises:
            NoReplica: none is alive.
        """
        candidates = self.candidates
        if not candidates:
            raise NoReplica(self.name)
        loads = tuple(
            ReplicaLoad(replica_id=replica.replica_id, work_s=replica.work_s)
            for replica in candidates
        )
        plan = self._policy(PoolSnapshot(replicas=loads, turn=self._turn), self._rng)
        self._turn += 1
        return self._replicas[plan.replica_id]
