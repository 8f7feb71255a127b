"""Suspects, each in a replica without another suspect: if that engine fails too, it is clear why.

Owns which of this router's suspects is in which decode replica, and the order of those that wait
for one. What makes a suspect is the business of `router.recovery`. Replicas say where other
routers' suspects are.
"""

from typing import Generic, TypeVar

_Request = TypeVar("_Request")


class Quarantine(Generic[_Request]):
    """One router's suspects."""

    def __init__(self) -> None:
        self._replica_ids: dict[_Request, str] = {}
        self._waiting: dict[_Request, None] = {}

    @property
    def occupied(self) -> frozenset[str]:
        """The replicas that have a suspect of this router."""
        return frozenset(self._replica_ids.values())

    @property
    def next(self) -> _Request | None:
        """Who waits longest."""
        return next(iter(self._waiting), None)

    @property
    def waiting(self) -> tuple[_Request, ...]:
        """In order."""
        return tuple(self._waiting)

    @property
    def all(self) -> tuple[_Request, ...]:
        """Those in replicas, and those that wait."""
        return (*self._replica_ids, *self._waiting)

    def wait(self, suspect: _Request) -> None:
        """A suspect is in no replica."""
        self._replica_ids.pop(suspect, None)
        self._waiting[suspect] = None

    def enter(self, suspect: _Request, replica_id: str) -> None:
        """A suspect goes to a replica, which has no other."""
        self._waiting.pop(suspect, None)
        self._replica_ids[suspect] = replica_id

    def leave(self, request: _Request) -> bool:
        """A request is cleared, or has ended; returns whether it was a suspect."""
        waited = self._waiting.pop(request, self) is None
        return self._replica_ids.pop(request, None) is not None or waited
