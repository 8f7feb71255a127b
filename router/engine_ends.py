"""The engines that this router has seen end, by cause.

Owns their count and the last one. An engine that ends says how, if it can; a replica that leaves
in an orderly way is none of them. Each router sees the end of an engine that it was connected to;
of one that ended at its start, one router is told (engine.start_failure).
"""

import time
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter

from engine.exit_cause import EngineExit
from router.pool import Replica


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineEnd:
    """One engine that has ended."""

    pool: str
    replica_id: str
    exit: EngineExit
    at_s: float
    """Of the system's clock, in seconds since 1970."""

    @property
    def text(self) -> str:
        """For people, one line."""
        return f"{self.pool} replica {self.replica_id}: {self.exit.text}"


class EngineEnds:
    """Counts engines that ended, and keeps the last."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._count = Counter(
            "pdserve_engine_ends",
            "Engines that ended under this router's eyes, by cause: a signal's name, error,"
            " stalled, or lost where the connection broke and nothing was said.",
            ("pool", "cause"),
            registry=registry,
        )
        self.last: EngineEnd | None = None

    def observe(self, replica: Replica) -> None:
        """A replica's connection has ended."""
        if (how := replica.exit or _guess(replica)) is not None:
            self.add(replica.pool.name, replica.replica_id, how)

    def add(self, pool: str, replica_id: str, how: EngineExit) -> None:
        """An engine has ended."""
        self._count.labels(pool, how.cause).inc()
        self.last = EngineEnd(pool=pool, replica_id=replica_id, exit=how, at_s=time.time())


def _guess(replica: Replica) -> EngineExit | None:
    reason = replica.end.closed_because if replica.end is not None else "it was never made"
    if replica.load.leaves_because == "stalled":
        return EngineExit(cause="stalled", text=f"the engine gave no sign of life: {reason}")
    if replica.is_leaving or not replica.has_joined:
        return None
    return EngineExit(cause="lost", text=f"the connection to it was lost: {reason}")
