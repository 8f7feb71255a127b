"""What one router knows of the work in one pool's replicas. Pure.

Owns a line for each replica: what this router has sent there and not seen end, and what the replica
last said that others have sent. Knows no connection and no clock: times are arguments. The
simulator's routers keep the same ledger.
"""

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from itertools import islice

from engine.lateness import PUT_BACK_S
from router.policies import MAX_CANDIDATES, PoolSnapshot, PrefixHit, ReplicaLoad
from router.transfers import TransferEstimate

RATE_TIME_S = 30.0
"""What this router has sent counts 1/e after this long, for how much it sends a second."""


@dataclass(slots=True)
class _Line:
    load: ReplicaLoad
    sent: dict[str, float] = field(default_factory=dict)
    """Predicted seconds by request id."""
    sent_s: float = 0.0
    deadlines: dict[str, float] = field(default_factory=dict)
    """By request id, of those that give way to others for a while once it has passed."""


class Ledger:
    """One router's view of one pool."""

    def __init__(self, *, num_routers: int = 1, drains: bool = True) -> None:
        """`drains`: work is done at one second a second, as in prefill. In decode it is what
        requests add to each step, for as long as they stay."""
        self._num_routers = num_routers
        self._drains = drains
        self._lines: dict[str, _Line] = {}
        self._open: dict[str, ReplicaLoad] = {}
        """Of the replicas that may get new work."""
        self._total_s = 0.0
        """Sum of these loads' work."""
        self._num_sent = 0
        self._recent_s = 0.0
        """Work that this router has sent, older less and less, as of `_recent_until_s`."""
        self._recent_until_s = 0.0
        self._turn = 0

    def __len__(self) -> int:
        """How many replicas may get new work."""
        return len(self._open)

    @property
    def open_ids(self) -> Set[str]:
        """The replicas that may get new work."""
        return self._open.keys()

    def has_open(self, barred: Set[str] = frozenset()) -> bool:
        """Whether a replica may get new work that is none of `barred`."""
        return not self._open.keys() <= barred if barred else bool(self._open)

    def work_s(self, replica_id: str) -> float:
        """Predicted work of a replica, as of its last report or what was sent since."""
        return self._lines[replica_id].load.work_s

    @property
    def mean_work_s(self) -> float:
        """Predicted work of a replica, as last counted; at least one must be open."""
        return self._total_s / len(self._open)

    @property
    def num_outstanding(self) -> int:
        """Requests that this router has in the pool."""
        return self._num_sent

    def num_sent(self, replica_id: str) -> int:
        """Requests that this router has there."""
        return len(self._lines[replica_id].sent)

    def has(self, replica_id: str, request_id: str) -> bool:
        """Whether this router has the request there."""
        line = self._lines.get(replica_id)
        return line is not None and request_id in line.sent

    def sent(self, replica_id: str) -> frozenset[str]:
        """The requests that this router has there."""
        return frozenset(self._lines[replica_id].sent)

    def insert(self, replica_id: str, now_s: float) -> None:
        """A replica has joined."""
        load = ReplicaLoad(replica_id=replica_id, work_s=0.0, counted_s=now_s, reported_s=now_s)
        self._lines[replica_id] = _Line(load=load)
        self._open[replica_id] = load

    def remove(self, replica_id: str) -> None:
        """A replica has left, and all that it had with it."""
        self.close(replica_id)
        line = self._lines.pop(replica_id, None)
        if line is not None:
            self._num_sent -= len(line.sent)

    def close(self, replica_id: str) -> None:
        """A replica gets nothing new."""
        load = self._open.pop(replica_id, None)
        if load is not None:
            self._total_s -= load.work_s

    def reopen(self, replica_id: str) -> bool:
        """A replica may get new work after all; returns whether it could not before."""
        if replica_id not in self._lines or replica_id in self._open:
            return False
        load = self._lines[replica_id].load
        self._open[replica_id] = load
        self._total_s += load.work_s
        return True

    def add(
        self,
        replica_id: str,
        request_id: str,
        work_s: float,
        *,
        now_s: float,
        deadline_s: float | None = None,
    ) -> None:
        """A request was sent. Where it has a deadline, it gives way to others from then on, for as
        long as engines put it back (`engine.lateness`)."""
        line = self._lines[replica_id]
        line.sent[request_id] = work_s
        self._num_sent += 1
        line.sent_s += work_s
        if deadline_s is not None:
            line.deadlines[request_id] = deadline_s
        self._recent_s = self._recent(now_s) + work_s
        self._recent_until_s = now_s
        load = line.load
        done_s = now_s - load.counted_s if self._drains else 0.0
        left_s = max(0.0, load.work_s - done_s)
        self._renew(line, left_s + work_s, counted_s=now_s, reported_s=load.reported_s)

    def complete(self, replica_id: str, request_id: str, *, was_done: bool = True) -> None:
        """A request has ended, by itself or not.

        Work that drains was counted down while the engine did it; what was not done, and what a
        request added to each step, is taken off here.
        """
        line = self._lines.get(replica_id)
        if line is None or request_id not in line.sent:
            return
        request_s = line.sent.pop(request_id)
        line.deadlines.pop(request_id, None)
        self._num_sent -= 1
        # Floats do not quite add up to nothing.
        line.sent_s = line.sent_s - request_s if line.sent else 0.0
        if not (was_done and self._drains):
            load = line.load
            self._renew(
                line,
                max(0.0, load.work_s - request_s),
                counted_s=load.counted_s,
                reported_s=load.reported_s,
            )

    def report(
        self, replica_id: str, *, others_work_s: float, progress_s: float, now_s: float
    ) -> None:
        """A replica says what others have sent there and how far it is with the oldest of all."""
        line = self._lines.get(replica_id)
        if line is not None:
            work_s = max(0.0, line.sent_s - _late_s(line, now_s)) + others_work_s
            if self._drains:
                work_s = max(0.0, work_s - progress_s)
            self._renew(line, work_s, counted_s=now_s, reported_s=now_s)

    def snapshot(
        self,
        now_s: float,
        *,
        request_s: float = 0.0,
        cached: Mapping[str, tuple[int, float]] | None = None,
        barred: Set[str] = frozenset(),
        transfer: TransferEstimate | None = None,
    ) -> PoolSnapshot:
        """What a policy decides on for one request; at least one replica must be open to it.

        Args:
            request_s: its own predicted seconds where nothing of it is cached.
            cached: by replica, how many of its tokens are cached there and what it costs there.
            barred: replicas that this request cannot go to.
            transfer: of the KV that it brings.
        """
        self._turn += 1
        loads = tuple(self._open.values())
        if barred:
            loads = tuple(load for load in loads if load.replica_id not in barred)
        others_work_per_s = (self._num_routers - 1) * self._recent(now_s) / RATE_TIME_S
        return PoolSnapshot(
            replicas=loads,
            now_s=now_s if self._drains else None,
            mean_work_s=self.mean_work_s,
            turn=self._turn - 1,
            num_routers=self._num_routers,
            others_work_per_s=others_work_per_s * len(loads) / len(self._open),
            request_s=request_s,
            hits=tuple(
                PrefixHit(load=self._open[key], num_cached_tokens=num_tokens, request_s=seconds)
                for key, (num_tokens, seconds) in (cached or {}).items()
                if key in self._open and key not in barred
            ),
            transfer=transfer,
            near=self._near(transfer, barred) if len(loads) > MAX_CANDIDATES else (),
        )

    def _near(self, transfer: TransferEstimate | None, barred: Set[str]) -> tuple[ReplicaLoad, ...]:
        near = transfer.near if transfer is not None else ()
        found = (self._open[key] for key in near if key in self._open and key not in barred)
        return tuple(islice(found, MAX_CANDIDATES))

    def _recent(self, now_s: float) -> float:
        return self._recent_s * math.exp((self._recent_until_s - now_s) / RATE_TIME_S)

    def _renew(self, line: _Line, work_s: float, *, counted_s: float, reported_s: float) -> None:
        replica_id = line.load.replica_id
        if replica_id in self._open:
            self._total_s += work_s - line.load.work_s
        line.load = ReplicaLoad(
            replica_id=replica_id, work_s=work_s, counted_s=counted_s, reported_s=reported_s
        )
        if replica_id in self._open:
            self._open[replica_id] = line.load


def _late_s(line: _Line, now_s: float) -> float:
    """Of what was sent there: work that new requests do not wait for."""
    return sum(
        line.sent[request_id]
        for request_id, deadline_s in line.deadlines.items()
        if deadline_s <= now_s < deadline_s + PUT_BACK_S
    )
