"""Makes pairs of engines ready: before a replica joins, and again and again where that fails.

Owns the attempts that are under way and the replicas that wait for theirs. What comes of a pair it
enters in `router.pairs`, by which requests are routed.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Set
from contextlib import suppress
from dataclasses import dataclass, field

from engine.errors import ChannelClosed
from engine.wire import Kind
from router.pairs import PATIENCE_S, Pair, Pairs, may_join
from router.pool import Pool, Replica

logger = logging.getLogger(__name__)

TIMEOUT_S = 30.0
"""Of one attempt."""
MOST_AT_ONCE = 16
"""Attempts of one decode replica: each has its engine do something between its steps."""


@dataclass(eq=False, slots=True)
class _Joining:
    """A replica that is connected and not in its pool yet, and how far it is with those that are
    in the other pool, by id."""

    replica: Replica
    trying: set[str] = field(default_factory=set)
    ready: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def move(self, other_id: str, to: set[str] | None) -> None:
        """Its pair with another is one of `to` now, or of nobody."""
        for each in (self.trying, self.ready, self.failed):
            each.discard(other_id)
        if to is not None:
            to.add(other_id)
        self.changed.set()


class WarmUps:
    """Has replicas join with the pairs that they complete."""

    def __init__(self, prefill: Pool, decode: Pool, pairs: Pairs) -> None:
        self._prefill = prefill
        self._decode = decode
        self._pairs = pairs
        self._joining: dict[str, _Joining] = {}
        self._attempts: dict[Pair, asyncio.Task[None]] = {}
        self._slots: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(MOST_AT_ONCE)
        )
        """By decode replica."""
        self._prefill_engines: set[str] = set()
        """That decode engines were told of."""

    @property
    def joining(self) -> tuple[Replica, ...]:
        """Replicas that are connected and not in their pool yet."""
        return tuple(each.replica for each in self._joining.values())

    async def join(self, replica: Replica) -> None:
        """Has a new replica join its pool once its pairs allow that.

        Raises:
            ChannelClosed: its connection has ended meanwhile.
        """
        since_s = time.monotonic()
        joining = self._joining[replica.replica_id] = _Joining(replica)
        try:
            for other in self._other_pool(replica):
                self._try(self._pair(replica, other.replica_id))
            while not self._may_join(joining, time.monotonic() - since_s):
                joining.changed.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(PATIENCE_S):
                        await joining.changed.wait()
        finally:
            del self._joining[replica.replica_id]
        replica.pool.insert(replica)
        for each in self._joining.values():
            if each.replica.pool is not replica.pool:
                self._try(self._pair(replica, each.replica.replica_id))

    def retry(self) -> None:
        """Tries again what is due."""
        for pair in self._pairs.due(time.monotonic()):
            self._try(pair)

    def broken(self, decode: Replica, prefill_id: str, problem: str) -> None:
        """A decode replica says that it cannot read from a prefill replica any more."""
        pair = Pair(prefill=prefill_id, decode=decode.replica_id)
        if pair not in self._attempts and self._find(self._prefill, prefill_id) is not None:
            self._failed(pair, problem)

    def gone(self, replica: Replica) -> None:
        """A replica's connection has ended, and its pairs with it."""
        replica_id = replica.replica_id
        for pair in [pair for pair in self._attempts if replica_id in (pair.prefill, pair.decode)]:
            self._attempts.pop(pair).cancel()
        self._slots.pop(replica_id, None)
        self._pairs.forget(replica_id)
        for joining in self._joining.values():
            joining.move(replica_id, None)

    def forget_all_but(self, prefill_ids: Set[str]) -> None:
        """Has decode engines drop what they keep of prefill engines that will not come back."""
        if gone := self._prefill_engines - prefill_ids:
            self._prefill_engines -= gone
            for decode in (*self._decode, *self.joining):
                if decode.pool is self._decode:
                    decode.end.send(Kind.FORGET, sorted(gone))

    def close(self) -> None:
        for task in self._attempts.values():
            task.cancel()

    def _may_join(self, joining: _Joining, waited_s: float) -> bool:
        replica = joining.replica
        if replica.closed_because is not None:
            raise ChannelClosed(replica.closed_because)
        joins = may_join(
            is_prefill=replica.pool is self._prefill,
            num_ready=len(joining.ready),
            num_trying=len(joining.trying),
            num_failed=len(joining.failed),
            waited_s=waited_s,
        )
        if joins and not joining.ready and (joining.failed or joining.trying):
            logger.error("decode replica %s reaches no prefill replica", replica.replica_id)
        return joins

    def _try(self, pair: Pair) -> None:
        prefill = self._find(self._prefill, pair.prefill)
        decode = self._find(self._decode, pair.decode)
        if prefill is not None and decode is not None and pair not in self._attempts:
            self._pairs.trying(pair)
            for joining, other_id in self._waiting_for(pair):
                joining.move(other_id, joining.trying)
            self._attempts[pair] = asyncio.create_task(self._attempt(pair, prefill, decode))

    async def _attempt(self, pair: Pair, prefill: Replica, decode: Replica) -> None:
        self._prefill_engines.add(pair.prefill)
        problem: str | None
        try:
            async with self._slots[pair.decode], asyncio.timeout(TIMEOUT_S):
                problem = await decode.warm_up(prefill.facts.kv)
        except TimeoutError:
            problem = f"no answer within {TIMEOUT_S:g} s"
        except Exception as error:
            # Whatever keeps these two apart, they are tried again.
            problem = str(error) or type(error).__name__
        del self._attempts[pair]
        if problem is None:
            self._ready(pair)
        else:
            self._failed(pair, problem)

    def _ready(self, pair: Pair) -> None:
        if self._pairs.problem(pair) is not None:
            logger.info("prefill %s and decode %s are a pair now", pair.prefill, pair.decode)
        self._pairs.ready(pair, time.monotonic())
        for joining, other_id in self._waiting_for(pair):
            joining.move(other_id, joining.ready)

    def _failed(self, pair: Pair, problem: str) -> None:
        if problem != self._pairs.problem(pair):
            logger.warning(
                "prefill %s and decode %s are no pair, and tried again: %s",
                pair.prefill,
                pair.decode,
                problem,
            )
        self._pairs.failed(pair, problem, time.monotonic())
        for joining, other_id in self._waiting_for(pair):
            joining.move(other_id, joining.failed)

    def _waiting_for(self, pair: Pair) -> tuple[tuple[_Joining, str], ...]:
        """The one of a pair that has not joined yet, if any, and the other's id."""
        sides = ((pair.prefill, pair.decode), (pair.decode, pair.prefill))
        return tuple(
            (self._joining[own_id], other_id)
            for own_id, other_id in sides
            if own_id in self._joining
        )

    def _other_pool(self, replica: Replica) -> Pool:
        return self._decode if replica.pool is self._prefill else self._prefill

    def _pair(self, replica: Replica, other_id: str) -> Pair:
        if replica.pool is self._prefill:
            return Pair(prefill=replica.replica_id, decode=other_id)
        return Pair(prefill=other_id, decode=replica.replica_id)

    def _find(self, pool: Pool, replica_id: str) -> Replica | None:
        joining = self._joining.get(replica_id)
        if joining is not None and joining.replica.pool is pool:
            return joining.replica
        return pool.get(replica_id)
