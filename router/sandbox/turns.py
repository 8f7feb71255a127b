"""Whose turn it is where few may be at once: clients take turns, however much each has waiting."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from router.errors import SandboxUnavailable


class Turns:
    """Lets so many in at once. Owns who waits.

    Where too many wait, one of the client that has most waiting is refused: its last.
    """

    def __init__(self, num_at_once: int, max_waiting: int) -> None:
        self._num_free = num_at_once
        self._max_waiting = max_waiting
        self._num_waiting = 0
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        """By client, in the order of their turns; none is empty."""

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """Waits for a turn of this client's.

        Raises:
            SandboxUnavailable: too many wait.
        """
        await self._enter(client)
        try:
            yield
        finally:
            self._leave()

    async def _enter(self, client: str) -> None:
        if self._num_free:
            self._num_free -= 1
            return
        if self._num_waiting >= self._max_waiting:
            self._make_room(client)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        self._num_waiting += 1
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._remove(client, turn)
            elif turn.exception() is None:
                # It was given one in the same moment.
                self._leave()
            raise

    def _leave(self) -> None:
        """The turn goes to the client whose last one is longest ago."""
        if not self._waiting:
            self._num_free += 1
            return
        client, turns = next(iter(self._waiting.items()))
        self._waiting.move_to_end(client)
        turn = turns[0]
        self._remove(client, turn)
        if turn.cancelled():
            self._leave()
        else:
            turn.set_result(None)

    def _make_room(self, client: str) -> None:
        most = max(self._waiting, key=lambda each: len(self._waiting[each]))
        if len(self._waiting[most]) <= len(self._waiting.get(client, ())) + 1:
            raise SandboxUnavailable
        last = self._waiting[most][-1]
        self._remove(most, last)
        if not last.done():
            last.set_exception(SandboxUnavailable())

    def _remove(self, client: str, turn: asyncio.Future[None]) -> None:
        turns = self._waiting.get(client, deque())
        if turn in turns:
            turns.remove(turn)
            self._num_waiting -= 1
            if not turns:
                del self._waiting[client]
