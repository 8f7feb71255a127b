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

from engine.errors import ChannelClosed
from engine.wire import Kind
from router.pairs import PATIENCE_S, Pair, Pairs, may_join
from router.pool import Pool, Replica

logger = logging.getLogger(__name__)

TIMEOUT_S = 30.0
"""Of one attempt."""
MOST_AT_ONCE = 16
"""Attempts of one decode replica: each has its engine do something between its steps."""


class WarmUps:
    """Has replicas join with the pairs that they complete."""

    def __init__(self, prefill: Pool, decode: Pool, pairs: Pairs) -> None:
        self._prefill = prefill
        self._decode = decode
        self._pairs = pairs
        self._joining: dict[str, Replica] = {}
        self._attempts: dict[Pair, asyncio.Task[None]] = {}
        self._slots: defaultdict[str, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(MOST_AT_ONCE)
        )
        """By decode replica."""
        self._changed = asyncio.Event()
        """An attempt has ended, a replica has joined or left."""
        self._prefill_engines: set[str] = set()
        """That decode engines were told of."""

    @property
    def joining(self) -> tuple[Replica, ...]:
        """Replicas that are connected and not in their pool yet."""
        return tuple(self._joining.values())

    async def join(self, replica: Replica) -> None:
        """Has a new replica join its pool once its pairs allow that.

        Raises:
            ChannelClosed: its connection has ended meanwhile.
        """
        since_s = time.monotonic()
        met: set[Replica] = set()
        self._joining[replica.replica_id] = replica
        try:
            while not self._may_join(replica, met, time.monotonic() - since_s):
                self._changed.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(PATIENCE_S):
                        await self._changed.wait()
        finally:
            del self._joining[replica.replica_id]
        replica.pool.insert(replica)
        self._changed.set()

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
        self._changed.set()

    def forget_all_but(self, prefill_ids: Set[str]) -> None:
        """Has decode engines drop what they keep of prefill engines that will not come back."""
        if gone := self._prefill_engines - prefill_ids:
            self._prefill_engines -= gone
            for decode in (*self._decode, *self._joining.values()):
                if decode.pool is self._decode and decode.end is not None:
                    decode.end.send(Kind.FORGET, sorted(gone))

    def close(self) -> None:
        for task in self._attempts.values():
            task.cancel()

    def _may_join(self, replica: Replica, met: set[Replica], waited_s: float) -> bool:
        """Whether it may, now that it has met those that have joined by now."""
        if replica.closed_because is not None:
            raise ChannelClosed(replica.closed_because)
        is_prefill = replica.pool is self._prefill
        others = list(self._decode if is_prefill else self._prefill)
        for other in others:
            if other not in met:
                met.add(other)
                self._try(_pair(replica, other) if is_prefill else _pair(other, replica))
        pairs = [_pair(replica, each) if is_prefill else _pair(each, replica) for each in others]
        num_trying = sum(pair in self._attempts for pair in pairs)
        num_ready = sum(self._pairs.is_ready(pair) for pair in pairs)
        joins = may_join(
            is_prefill=is_prefill,
            num_ready=num_ready,
            num_trying=num_trying,
            num_failed=len(pairs) - num_trying - num_ready,
            waited_s=waited_s,
        )
        if joins and pairs and not num_ready:
            logger.error("decode replica %s reaches no prefill replica", replica.replica_id)
        return joins

    def _try(self, pair: Pair) -> None:
        prefill = self._find(self._prefill, pair.prefill)
        decode = self._find(self._decode, pair.decode)
        if prefill is None or decode is None or pair in self._attempts:
            return
        self._pairs.trying(pair)
        self._attempts[pair] = asyncio.create_task(self._attempt(pair, prefill, decode))

    async def _attempt(self, pair: Pair, prefill: Replica, decode: Replica) -> None:
        assert prefill.facts is not None
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
            self._pairs.ready(pair, time.monotonic())
        else:
            self._failed(pair, problem)
        self._changed.set()

    def _failed(self, pair: Pair, problem: str) -> None:
        before = self._pairs.problem(pair)
        self._pairs.failed(pair, problem, time.monotonic())
        if problem != before:
            logger.warning(
                "prefill %s and decode %s are no pair, and tried again: %s",
                pair.prefill,
                pair.decode,
                problem,
            )

    def _find(self, pool: Pool, replica_id: str) -> Replica | None:
        joining = self._joining.get(replica_id)
        if joining is not None and joining.pool is pool:
            return joining
        return pool.get(replica_id)


def _pair(prefill: Replica, decode: Replica) -> Pair:
    return Pair(prefill=prefill.replica_id, decode=decode.replica_id)
