"""What moved between which engines: vLLM's NIXL transfer stats, with a sum for each pair.

Owns the format in which pair sums, and the ends of warm-ups, travel inside vLLM's step stats. Never
exports a metric: the replica does, from `pair_deltas`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats

from kvtransfer.memory_reads import CopyTelemetry

PAIRS_KEY = "pairs"
WARMED_KEY = "warmed"
_BYTES, _SECONDS, _TRANSFERS, _FAILURES, _ENDED_LEASES, _COPIES = range(6)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairDelta:
    """What one engine read from another since its last report."""

    remote_engine_id: str
    num_bytes: int
    seconds: float
    num_transfers: int
    num_copies: int
    """Of the transfers, those that copied memory of this host, without NIXL."""
    num_failures: int
    """Attempts to read that did not end well; a request has two."""
    num_ended_leases: int
    """Requests whose blocks were read and not used: they may have been another's by then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmedWorker:
    """What became of a warm-up in one of a decode engine's workers."""

    rank: int
    """Of the worker, in its engine."""
    problem: str | None


def warmed_workers(
    kv_connector_stats: Mapping[str, Any] | None,
) -> tuple[tuple[str, tuple[WarmedWorker, ...]], ...]:
    """Of `SchedulerStats.kv_connector_stats`: prefill engines, and the workers done with them."""
    if kv_connector_stats is None:
        return ()
    return tuple(
        (engine_id, tuple(WarmedWorker(rank=rank, problem=problem) for rank, problem in workers))
        for engine_id, workers in kv_connector_stats.get(WARMED_KEY, {}).items()
    )


def pair_deltas(kv_connector_stats: Mapping[str, Any] | None) -> tuple[PairDelta, ...]:
    """Reads `SchedulerStats.kv_connector_stats`: increments since the engine's step before."""
    if kv_connector_stats is None:
        return ()
    return tuple(
        PairDelta(
            remote_engine_id=remote_engine_id,
            num_bytes=sums[_BYTES],
            seconds=sums[_SECONDS],
            num_transfers=sums[_TRANSFERS],
            num_copies=sums[_COPIES],
            num_failures=sums[_FAILURES],
            num_ended_leases=sums[_ENDED_LEASES],
        )
        for remote_engine_id, sums in kv_connector_stats.get(PAIRS_KEY, {}).items()
    )


class PairStats(NixlKVConnectorStats):  # type: ignore[misc]
    """vLLM's lists of observations, and under `pairs` their sums for each remote engine.

    Lists and dicts of numbers only, so that it passes vLLM's pickling between processes and its
    msgpack to the client. One record call is one increment; `clone_and_reset` hands over a delta.
    """

    remote_engine_id: str
    """Whose transfers are recorded next; the worker sets it."""

    def reset(self) -> None:
        super().reset()
        self.data[PAIRS_KEY] = {}
        self.data[WARMED_KEY] = {}

    def record_transfer(self, res: Any) -> None:
        """Adds a finished read; `res` is the telemetry of it (bytes, microseconds), as NIXL's."""
        super().record_transfer(res)
        sums = self._sums(self.remote_engine_id)
        sums[_BYTES] += res.totalBytes
        sums[_SECONDS] += res.xferDuration / 1e6
        sums[_TRANSFERS] += 1
        sums[_COPIES] += isinstance(res, CopyTelemetry)

    def moved(self, remote_engine_id: str) -> tuple[int, float]:
        """Bytes and seconds of this increment's reads of an engine."""
        sums = self.data[PAIRS_KEY].get(remote_engine_id)
        return (0, 0.0) if sums is None else (sums[_BYTES], sums[_SECONDS])

    def record_pair_failure(self, remote_engine_id: str) -> None:
        """Adds a read that failed, for whatever reason."""
        self._sums(remote_engine_id)[_FAILURES] += 1

    def record_ended_lease(self, remote_engine_id: str) -> None:
        """Adds a request whose lease had ended when its blocks were there."""
        self._sums(remote_engine_id)[_ENDED_LEASES] += 1

    def record_warmed(self, remote_engine_id: str, worker: WarmedWorker) -> None:
        """Adds that a worker is done with a warm-up, in a step and not when it was asked."""
        workers = self.data[WARMED_KEY].setdefault(remote_engine_id, [])
        workers.append((worker.rank, worker.problem))

    def is_empty(self) -> bool:
        noted = self.data[PAIRS_KEY] or self.data[WARMED_KEY]
        return not noted and bool(super().is_empty())

    def aggregate(self, other: Any) -> "PairStats":
        for key, observed in other.data.items():
            if key == PAIRS_KEY:
                for remote_engine_id, sums in observed.items():
                    mine = self._sums(remote_engine_id)
                    mine[:] = [a + b for a, b in zip(mine, sums, strict=True)]
            elif key == WARMED_KEY:
                for engine_id, workers in observed.items():
                    self.data[key].setdefault(engine_id, []).extend(workers)
            else:
                self.data[key].extend(observed)
        return self

    def _sums(self, remote_engine_id: str) -> list[Any]:
        sums: list[Any] = self.data[PAIRS_KEY].setdefault(remote_engine_id, [0, 0.0, 0, 0, 0, 0])
        return sums
