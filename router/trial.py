"""Which of the requests that may have killed an engine is tried in the next one: one at a time.

Should that engine die too, it is clear by whom. Owns their order. Who is a suspect is the business
of `router.recovery`, what becomes of a request that of the core client.
"""

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

_Request = TypeVar("_Request")


class Trial(Generic[_Request]):
    """The one suspect that is in the engines, and those that wait for it."""

    def __init__(self) -> None:
        self._tried: _Request | None = None
        self._waiting: deque[_Request] = deque()

    def takes(self, suspect: _Request) -> bool:
        """Whether a suspect may go to an engine now; if not, it waits for its turn."""
        if self._tried is None:
            self._tried = suspect
        if self._tried is not suspect:
            self._waiting.append(suspect)
        return self._tried is suspect

    def acquit(self, request: _Request) -> Iterator[_Request]:
        """A request has shown that it kills nobody: those that may try now.

        That is one, or more where the first finds no replica, so is not tried after all.
        """
        if self._tried is request:
            self._tried = None
        while self._tried is None and self._waiting:
            yield self._waiting.popleft()

    def leave(self, request: _Request) -> Iterator[_Request]:
        """A request has ended, whichever way: those that may try now, as in `acquit`."""
        if request in self._waiting:
            self._waiting.remove(request)
        return self.acquit(request)
