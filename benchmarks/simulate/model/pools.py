"""Pools of simulated replicas: starting, ready, draining, gone, and the GPU seconds they took."""

import enum
from dataclasses import dataclass, field
from typing import Protocol

from benchmarks.simulate.model.engine import Engine, EngineListener
from benchmarks.simulate.model.event_queue import EventQueue
from benchmarks.simulate.model.history import PoolView
from benchmarks.simulate.model.profiles import EngineProfile
from engine.outstanding import OutstandingWork
from kvtransfer.phase import Phase


class ReplicaState(enum.Enum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    GONE = "gone"


@dataclass(slots=True, eq=False)
class SimReplica:
    """Holds its GPUs from the decision to start it until it is gone."""

    replica_id: str
    index: int
    engine: Engine
    started_s: float
    state: ReplicaState = ReplicaState.STARTING
    gone_s: float | None = None
    outstanding: OutstandingWork[int] = field(default_factory=OutstandingWork)
    """By router."""


class PoolWatcher(Protocol):
    """Whom a pool tells of its replicas."""

    def joined(self, pool: "SimPool", replica: SimReplica) -> None:
        """It takes requests from now on."""

    def closed(self, pool: "SimPool", replica: SimReplica) -> None:
        """It gets nothing new."""

    def gone(self, pool: "SimPool", replica: SimReplica) -> None:
        """It is no more, whether it had drained or died, or never been ready."""


class SimPool:
    """Owns its replicas."""

    def __init__(
        self,
        name: Phase,
        events: EventQueue,
        profile: EngineProfile,
        listener: EngineListener,
        watcher: "PoolWatcher",
    ) -> None:
        self.name = name
        self.profile = profile
        self.replicas: list[SimReplica] = []
        """All that ever were."""
        self.ready: list[SimReplica] = []
        self.by_id: dict[str, SimReplica] = {}
        self.by_engine: dict[int, SimReplica] = {}
        self.num_scalings = 0
        self._events = events
        self._listener = listener
        self._watcher = watcher
        self._present: list[SimReplica] = []
        self._gone_gpu_s = 0.0

    @property
    def num_present(self) -> int:
        """That hold GPUs, starting and draining ones too."""
        return len(self._present)

    @property
    def present(self) -> tuple[SimReplica, ...]:
        return tuple(self._present)

    def start(self, *, is_ready: bool = False) -> SimReplica:
        """Starts a replica, which takes the profile's time, or none where `is_ready`."""
        engine = Engine(self._events, self.profile, self._listener)
        index = len(self.replicas)
        replica = SimReplica(f"{self.name}-{index:05d}", index, engine, self._events.now_s)
        self.replicas.append(replica)
        self._present.append(replica)
        self.by_id[replica.replica_id] = replica
        self.by_engine[id(engine)] = replica
        if is_ready:
            self._make_ready(replica)
        else:
            self._events.after(self.profile.start_s, lambda: self._make_ready(replica))
        return replica

    def scale_to(self, num_replicas: int) -> None:
        """Starts, or drains those that start last and then those with least to do."""
        alive = [each for each in self._present if each.state is not ReplicaState.DRAINING]
        if num_replicas != len(alive):
            self.num_scalings += 1
        for _ in range(num_replicas - len(alive)):
            self.start()
        if num_replicas < len(alive):
            alive.sort(key=lambda each: (each.state is ReplicaState.READY, -each.started_s))
            starting = [each for each in alive if each.state is ReplicaState.STARTING]
            serving = [each for each in alive if each.state is ReplicaState.READY]
            serving.sort(key=lambda each: (each.engine.num_requests, -each.index))
            for replica in [*reversed(starting), *serving][: len(alive) - num_replicas]:
                self._drain(replica)

    def fail(self, replica: SimReplica) -> None:
        """It dies now; what it had is for the caller to take."""
        self._remove(replica)

    def drained(self, replica: SimReplica) -> None:
        """To be told whenever a replica may have become empty."""
        engine = replica.engine
        is_empty = engine.kv_used <= 0 and not engine.num_requests
        if replica.state is ReplicaState.DRAINING and is_empty:
            self._remove(replica)

    def gpu_seconds(self) -> float:
        now_s = self._events.now_s
        present_s = sum(now_s - each.started_s for each in self._present)
        return self._gone_gpu_s + present_s * self.profile.gpus

    def view(self, num_held: int) -> PoolView:
        """The pool now; `num_held` requests wait for a replica to be there."""
        states = [each.state for each in self._present]
        engines = [each.engine for each in self.ready]
        return PoolView(
            num_ready=len(self.ready),
            num_starting=states.count(ReplicaState.STARTING),
            num_draining=states.count(ReplicaState.DRAINING),
            num_waiting=num_held + sum(len(engine.waiting) for engine in engines),
            num_ongoing=num_held + sum(engine.num_requests for engine in engines),
            waiting_tokens=sum(engine.num_waiting_tokens for engine in engines),
            kv_tokens=sum(engine.kv_used for engine in engines),
            kv_capacity_tokens=self.profile.kv_capacity_tokens,
        )

    def _make_ready(self, replica: SimReplica) -> None:
        if replica.state is ReplicaState.STARTING:
            replica.state = ReplicaState.READY
            self.ready.append(replica)
            self._watcher.joined(self, replica)

    def _drain(self, replica: SimReplica) -> None:
        was_ready = replica.state is ReplicaState.READY
        replica.state = ReplicaState.DRAINING
        if was_ready:
            self.ready.remove(replica)
            self._watcher.closed(self, replica)
        self.drained(replica)

    def _remove(self, replica: SimReplica) -> None:
        was_ready = replica.state is ReplicaState.READY
        replica.state = ReplicaState.GONE
        replica.gone_s = self._events.now_s
        self._present.remove(replica)
        self._gone_gpu_s += (replica.gone_s - replica.started_s) * self.profile.gpus
        if was_ready:
            self.ready.remove(replica)
        self._watcher.gone(self, replica)
