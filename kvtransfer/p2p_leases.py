"""What a prefill worker holds for decodes that will come, and until when.

Owns the leases of one worker. Never frees a block: vLLM does, of the requests in `collect`.

A lease is known from the step that first ran its request (`admit`), runs from the step after its
last (`hold`), and ends when a decode has read it, when it is released, or when its time is up. One
that is being read (`pin`) ends when the reading does.
"""

import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """Requests whose leases ended since the last time."""

    read_or_released: frozenset[str]
    expired: frozenset[str]


class Leases:
    """The leases of one worker. Its own lock: the model's thread and every pair's use it."""

    def __init__(self, *, extension_s: float) -> None:
        self._extension_s = extension_s
        self._lock = threading.Lock()
        self._lease_ids: dict[str, int] = {}
        self._expiries_s: dict[str, float] = {}
        self._num_readers: Counter[str] = Counter()
        self._ended: set[str] = set()

    def admit(self, lease_ids: Mapping[str, int]) -> None:
        """These requests run, each under its lease."""
        with self._lock:
            self._lease_ids.update(lease_ids)

    def drop(self, request_ids: Iterable[str]) -> None:
        """These requests ended with nothing to be read."""
        with self._lock:
            for request_id in request_ids:
                self._forget(request_id)

    def hold(self, request_id: str, *, expiry_s: float) -> None:
        """The lease of a request that was admitted runs, on the clock that `collect` is given."""
        with self._lock:
            if request_id in self._lease_ids:
                self._expiries_s[request_id] = expiry_s

    def pin(self, request_id: str, lease_id: int) -> bool:
        """Whether the request is still held under this lease; then it is until `unpin`."""
        with self._lock:
            held = self._lease_ids.get(request_id) == lease_id and request_id not in self._ended
            if held:
                self._num_readers[request_id] += 1
            return held

    def unpin(self, request_id: str) -> None:
        with self._lock:
            self._num_readers[request_id] -= 1
            if not self._num_readers[request_id]:
                del self._num_readers[request_id]

    def finish(self, request_id: str, lease_id: int) -> None:
        """A decode has read it. Nothing where that lease has ended."""
        with self._lock:
            if self._lease_ids.get(request_id) == lease_id:
                self._ended.add(request_id)

    def release(self, request_ids: Iterable[str]) -> None:
        """No decode will come for these, known or not."""
        with self._lock:
            self._ended.update(self._lease_ids.keys() & set(request_ids))

    def extend(self, request_ids: Iterable[str], *, now_s: float) -> None:
        """A decode will come for these."""
        with self._lock:
            for request_id in self._expiries_s.keys() & set(request_ids):
                expiry_s = now_s + self._extension_s
                self._expiries_s[request_id] = max(self._expiries_s[request_id], expiry_s)

    def collect(self, *, now_s: float) -> Ended:
        """Takes out the leases that have ended and that nobody reads."""
        with self._lock:
            # One that ended before it ran waits: its request is not finished in vLLM's eyes.
            idle = self._expiries_s.keys() - self._num_readers.keys()
            ended = frozenset(self._ended & idle)
            expired = frozenset(
                request_id for request_id in idle - ended if self._expiries_s[request_id] <= now_s
            )
            for request_id in ended | expired:
                self._forget(request_id)
            return Ended(read_or_released=ended, expired=expired)

    def _forget(self, request_id: str) -> None:
        self._lease_ids.pop(request_id, None)
        self._expiries_s.pop(request_id, None)
        self._ended.discard(request_id)
