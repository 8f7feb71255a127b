"""Requests that have no token yet, and how long they may be without one.

Owns their deadlines. What becomes of a request that misses its own is its owner's business.
"""

import asyncio
from collections.abc import Callable, Iterator

from router.request import RequestState


class PendingFirstTokens:
    """The requests of one router between receipt and first token."""

    def __init__(self, timeout_s: float | None, too_late: Callable[[RequestState], None]) -> None:
        self._timeout_s = timeout_s
        self._too_late = too_late
        self._waiting: dict[str, asyncio.TimerHandle | None] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[str]:
        """The requests' ids."""
        return iter(self._waiting)

    def add(self, state: RequestState) -> None:
        """A request was received."""
        timer = None
        if self._timeout_s is not None:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(self._timeout_s, self._too_late, state)
        self._waiting[state.request_id] = timer

    def discard(self, state: RequestState) -> None:
        """A request has its first token, or ends without one."""
        timer = self._waiting.pop(state.request_id, None)
        if timer is not None:
            timer.cancel()
