"""The faults of the chaos run: which there are, which comes next, and whom it hits.

Owns the order of the faults. Pure: the choice is made from what was observed and a given random
generator; benchmarks.chaos_processes carries it out.
"""

import random
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from kvtransfer.phase import Phase


class Kind(Enum):
    """What happens. The value is its name on the command line and in the report."""

    KILL_REPLICA = "kill-replica"
    KILL_ENGINE = "kill-engine"
    STOP_ENGINE = "stop-engine"
    TERM_REPLICA = "term-replica"
    SCALE_DOWN = "scale-down"
    KILL_ROUTER = "kill-router"
    CUT = "cut"
    BLACK_HOLE = "black-hole"
    CUT_KV = "cut-kv"
    CLOCK_JUMP = "clock-jump"
    DISK_FULL = "disk-full"
    MEMORY_PRESSURE = "memory-pressure"
    CROWD = "crowd"
    CLIENTS_LEAVE = "clients-leave"
    SLOW_READER = "slow-reader"

    @property
    def hits_pool(self) -> bool:
        """Whether it costs a pool a replica."""
        others = self.is_of_clients or self.is_of_network or self.is_of_node
        return not (self is Kind.KILL_ROUTER or others)

    @property
    def is_of_network(self) -> bool:
        """Whether processes live and cannot reach each other."""
        return self in (Kind.CUT, Kind.BLACK_HOLE, Kind.CUT_KV)

    @property
    def is_of_node(self) -> bool:
        """Whether all processes live, on a node that is not as it was."""
        return self in (Kind.CLOCK_JUMP, Kind.DISK_FULL)

    @property
    def is_of_clients(self) -> bool:
        """Whether it is clients' doing."""
        return self in (Kind.CLIENTS_LEAVE, Kind.SLOW_READER)


DESCRIPTIONS: Mapping[Kind, str] = {
    Kind.KILL_REPLICA: "SIGKILL of a replica's process",
    Kind.KILL_ENGINE: "SIGKILL of a replica's engine core",
    Kind.STOP_ENGINE: "SIGSTOP of an engine core, for good: it has to be noticed and replaced",
    Kind.TERM_REPLICA: "SIGTERM of a replica's process, as before a spot machine is taken away",
    Kind.SCALE_DOWN: "a redeployment with one replica less, taken back when that is gone",
    Kind.KILL_ROUTER: "SIGKILL of a router's process while there is another",
    Kind.CUT: "every TCP connection between a router and a replica is cut",
    Kind.BLACK_HOLE: "nothing passes between a router and a replica, for longer than the stall "
    "timeout",
    Kind.CUT_KV: "every TCP connection between a prefill and a decode engine is cut",
    Kind.CLOCK_JUMP: "the time of day goes an hour forward, and back after two more faults; takes "
    "a C compiler",
    Kind.DISK_FULL: "no space is left for logs, caches and temporary files, until after two more "
    "faults; takes root",
    Kind.MEMORY_PRESSURE: "a replica gets no more memory, until the kernel ends a process of it; "
    "takes root",
    Kind.CROWD: "256 streams at once on two decode replicas, one of which is killed, or on one",
    Kind.CLIENTS_LEAVE: "a burst of streams whose clients leave midway",
    Kind.SLOW_READER: "a client that reads nothing of a long stream for a while, then the rest",
}

_WEIGHTS: Mapping[Kind, int] = {Kind.KILL_REPLICA: 2, Kind.KILL_ENGINE: 2}
"""How often a kind comes in each round of all kinds; once where nothing else is said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What shall happen; `pool` is whom it costs a replica, if anyone."""

    kind: Kind
    pool: Phase | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A replica that was seen: its process, and its engine core's if that has started."""

    pid: int
    created_s: float
    engine_pid: int | None


class FaultOrder:
    """Deals out the kinds in rounds, shuffled, so that a short run sees them all.

    Owns the rest of the round: a kind that cannot be used now is kept for later.
    """

    def __init__(
        self, rng: random.Random, kinds: Iterable[Kind] = Kind, *, spare_last: bool = False
    ) -> None:
        self._rng = rng
        self._round = [kind for kind in kinds for _ in range(_WEIGHTS.get(kind, 1))]
        self._min_live = 2 if spare_last else 1
        self._rest: list[Kind] = []

    def next(self, num_live: Mapping[Phase, int], *, num_routers: int) -> Fault | None:
        """The next fault, given each pool's live replicas; None if there is none to use now.

        A pool without a live replica is left alone; of two, the one with more is taken. The last
        router is left alone: without it no client gets in.
        """
        eligible = {pool: num for pool, num in num_live.items() if num >= self._min_live}
        kind = self._draw(
            eligible,
            can_hit_router=num_routers > 1,
            can_part=num_routers > 0 and all(num_live.values()),
        )
        if kind is None:
            return None
        if not kind.hits_pool:
            return Fault(kind=kind, pool=None)
        if kind is Kind.CROWD:
            return Fault(kind=kind, pool="decode")
        most = max(eligible.values())
        fullest = sorted(pool for pool, num in eligible.items() if num == most)
        return Fault(kind=kind, pool=self._rng.choice(fullest))

    def _draw(
        self, eligible: Collection[Phase], *, can_hit_router: bool, can_part: bool
    ) -> Kind | None:
        def usable(kind: Kind) -> bool:
            if kind.is_of_network:
                return can_part
            if kind is Kind.KILL_ROUTER:
                return can_hit_router
            if kind is Kind.CROWD:
                return "decode" in eligible
            return bool(eligible) or not kind.hits_pool

        if not any(usable(kind) for kind in self._round):
            return None
        if not any(usable(kind) for kind in self._rest):
            self._rest += self._rng.sample(self._round, k=len(self._round))
        first = next(at for at, kind in enumerate(self._rest) if usable(kind))
        return self._rest.pop(first)


def live_members(
    members: Iterable[Member], *, num_live: int, already_hit: frozenset[int]
) -> tuple[Member, ...]:
    """Which of a pool's processes are its live replicas, the oldest first.

    From outside a starting replica looks like a live one. The router says how many are live, and
    those have been there longest, but for the ones that were hit and are not gone yet.
    """
    ready = [
        member
        for member in members
        if member.pid not in already_hit and member.engine_pid is not None
    ]
    ready.sort(key=lambda member: member.created_s)
    return tuple(ready[:num_live])
