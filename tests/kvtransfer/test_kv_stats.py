"""Pair sums through what vLLM does with stats: merge, hand over and reset, encode, decode."""

from dataclasses import dataclass, replace

import msgspec

from kvtransfer.memory_reads import CopyTelemetry
from kvtransfer.stats import PairDelta, PairStats, WarmedWorker, pair_deltas, warmed_workers


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """As NIXL gives it, microseconds."""

    xferDuration: int  # noqa: N815
    postDuration: int  # noqa: N815
    totalBytes: int  # noqa: N815
    descCount: int  # noqa: N815


def observed(*reads: tuple[str, int, int]) -> PairStats:
    stats = PairStats()
    for remote_engine_id, num_bytes, duration_us in reads:
        stats.remote_engine_id = remote_engine_id
        stats.record_transfer(
            Telemetry(xferDuration=duration_us, postDuration=1, totalBytes=num_bytes, descCount=1)
        )
    return stats


def delta(remote_engine_id: str, num_bytes: int, seconds: float, num_transfers: int) -> PairDelta:
    return PairDelta(
        remote_engine_id=remote_engine_id,
        num_bytes=num_bytes,
        seconds=seconds,
        num_transfers=num_transfers,
        num_copies=0,
        num_failures=0,
        num_ended_leases=0,
    )


def test_each_pair_has_its_own_sums() -> None:
    stats = observed(("a", 10, 1_000_000), ("b", 5, 500_000), ("a", 20, 2_000_000))
    assert pair_deltas(stats.to_dict()) == (delta("a", 30, 3.0, 2), delta("b", 5, 0.5, 1))


def test_copies_are_counted_among_the_transfers() -> None:
    stats = observed(("a", 10, 1_000_000))
    stats.record_transfer(
        CopyTelemetry(totalBytes=20, xferDuration=5e5, postDuration=0.0, descCount=1)
    )
    assert pair_deltas(stats.to_dict()) == (replace(delta("a", 30, 1.5, 2), num_copies=1),)


def test_ranks_of_one_engine_add_up() -> None:
    merged = observed(("a", 10, 1_000_000)).aggregate(
        observed(("a", 20, 2_000_000), ("b", 5, 500_000))
    )
    assert pair_deltas(merged.to_dict()) == (delta("a", 30, 3.0, 2), delta("b", 5, 0.5, 1))
    assert merged.num_successful_transfers == 3


def test_what_was_handed_over_is_not_reported_again() -> None:
    stats = observed(("a", 10, 1_000_000))
    assert pair_deltas(stats.clone_and_reset().to_dict()) == (delta("a", 10, 1.0, 1),)
    assert stats.is_empty()
    assert pair_deltas(stats.to_dict()) == ()


def test_a_failure_alone_is_worth_a_report() -> None:
    stats = PairStats()
    stats.record_pair_failure("a")
    assert not stats.is_empty()
    (failed,) = pair_deltas(stats.to_dict())
    assert (failed.num_failures, failed.num_transfers) == (1, 0)


def test_an_ended_lease_is_no_failed_read() -> None:
    stats = PairStats()
    stats.record_ended_lease("a")
    assert not stats.is_empty()
    (ended,) = pair_deltas(stats.to_dict())
    assert (ended.num_ended_leases, ended.num_failures) == (1, 0)


def test_sums_survive_the_wire() -> None:
    stats = observed(("a", 10, 1_000_000))
    wired = msgspec.msgpack.decode(msgspec.msgpack.encode(stats.to_dict()))
    assert pair_deltas(wired) == pair_deltas(stats.to_dict())
    assert pair_deltas(None) == ()


def test_ends_of_warm_ups_travel_with_a_step() -> None:
    stats, other = PairStats(), PairStats()
    assert stats.is_empty()
    stats.record_warmed("a", WarmedWorker(rank=0, problem=None))
    assert not stats.is_empty()
    other.record_warmed("a", WarmedWorker(rank=1, problem="no way"))
    merged = stats.clone_and_reset().aggregate(other)
    assert stats.is_empty()
    arrived = msgspec.msgpack.decode(msgspec.msgpack.encode(merged.to_dict()))
    assert warmed_workers(arrived) == (
        ("a", (WarmedWorker(rank=0, problem=None), WarmedWorker(rank=1, problem="no way"))),
    )
    assert warmed_workers(None) == ()
    assert pair_deltas(arrived) == ()
