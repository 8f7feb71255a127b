"""What has gone wrong with replicas under this router's eyes: faults, and engines that ended.

Owns their counts and the last of each. A replica that leaves in an orderly way is none of them.
Each router sees what becomes of a replica that it was connected to; of an engine that ended at its
start, one router is told (engine.start_failure).
"""

import time
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter

from engine.exit_cause import EngineExit
from router.faults import Fault
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenFault:
    """One fault of a replica."""

    pool: str
    replica_id: str
    fault: Fault
    reason: str
    at_s: float
    """Of the system's clock, in seconds since 1970."""

    @property
    def text(self) -> str:
        """For people, one line."""
        name = self.fault.value.replace("_", " ")
        return f"{self.pool} replica {self.replica_id}: {name}: {self.reason}"


class EngineEnds:
    """Counts faults of replicas and engines that ended, and keeps the last."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._faults = Counter(
            "pdserve_faults",
            "Faults of replicas that this router was connected to.",
            ("pool", "fault"),
            registry=registry,
        )
        self._ends = Counter(
            "pdserve_engine_ends",
            "Engine failures that this router has seen, by cause: a signal's name, or `error`.",
            ("pool", "cause"),
            registry=registry,
        )
        self.last: EngineEnd | None = None
        self.last_fault: SeenFault | None = None

    def observe(self, replica: Replica) -> None:
        """A replica's connection has ended."""
        if replica.exit is not None:
            self.add(replica.pool.name, replica.replica_id, replica.exit)
        elif (seen := self.see(replica)) is not None:
            self.count(seen)

    def see(self, replica: Replica) -> SeenFault | None:
        """As `observe`, where it may turn out to be another fault: the one to be counted else."""
        if replica.fault is None or not replica.has_joined:
            return None
        reason = replica.closed_because or "it is open"
        self.last_fault = _seen(replica.pool.name, replica.replica_id, replica.fault, reason)
        return self.last_fault

    def count(self, seen: SeenFault) -> None:
        """It was no other fault."""
        self._faults.labels(seen.pool, seen.fault.value).inc()

    def add(self, pool: str, replica_id: str, how: EngineExit) -> None:
        """An engine has ended."""
        self._ends.labels(pool, how.cause).inc()
        self.last = EngineEnd(pool=pool, replica_id=replica_id, exit=how, at_s=time.time())
        self.add_fault(pool, replica_id, Fault.ENGINE_ENDED, how.text)

    def add_fault(self, pool: str, replica_id: str, fault: Fault, reason: str) -> None:
        """A fault was seen."""
        self.last_fault = _seen(pool, replica_id, fault, reason)
        self.count(self.last_fault)


def _seen(pool: str, replica_id: str, fault: Fault, reason: str) -> SeenFault:
    return SeenFault(pool=pool, replica_id=replica_id, fault=fault, reason=reason, at_s=time.time())
