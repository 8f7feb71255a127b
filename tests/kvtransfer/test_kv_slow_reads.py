"""Slow reads are waited for, and a peer that is gone is found; on a clock of the test's own."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from nixl_workers import HOST, Workers, nixl_workers

from kvtransfer import worker
from kvtransfer.errors import PeerTimeout
from kvtransfer.handshake import fetch_payloads
from kvtransfer.pair_reads import ReadLimits

TIMEOUT_S = 5.0
BYTES_PER_S = 1e6
READS_AT_ONCE = 4


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Workers]:
    with nixl_workers(monkeypatch, bytes_per_s=BYTES_PER_S, read_timeout_s=TIMEOUT_S) as workers:
        assert workers.decode._read_limits == ReadLimits(timeout_s=TIMEOUT_S)
        workers.decode._read_limits = ReadLimits(
            timeout_s=TIMEOUT_S, bytes_at_once=READS_AT_ONCE * workers.read_bytes
        )
        yield workers


def test_a_burst_of_reads_is_read_in_order_over_one_connection(workers: Workers) -> None:
    names = [f"request {number:03d}" for number in range(256)]
    connection = workers.connection
    taken_s = len(names) * workers.read_bytes / BYTES_PER_S
    assert taken_s > 2 * TIMEOUT_S
    workers.ask_for(names)
    assert workers.until(len(names), step_s=0.02, within_s=1.5 * taken_s) >= taken_s
    assert sorted(workers.finished) == names
    assert workers.reads.first_blocks == sorted(workers.reads.first_blocks)
    assert workers.failed == set()
    assert workers.connection is connection
    assert workers.reads.most_at_once == READS_AT_ONCE * workers.read_bytes
    assert workers.num_failures == 0


def test_one_read_may_take_many_timeouts(workers: Workers) -> None:
    connection = workers.connection
    workers.reads.bytes_per_s = workers.read_bytes / (4 * TIMEOUT_S)
    workers.ask_for(["slow", "slower"])
    assert workers.until(2, step_s=0.5, within_s=20 * TIMEOUT_S) >= 7 * TIMEOUT_S
    assert workers.failed == set()
    assert workers.connection is connection
    assert workers.num_failures == 0


def test_a_peer_that_is_gone_is_found(workers: Workers) -> None:
    """It ends no connection, as a host that loses its network."""
    names = [f"request {number:03d}" for number in range(40)]
    workers.reads.silent = True
    workers.channel.stop()
    workers.ask_for(names)
    workers.step(TIMEOUT_S * 0.9)
    assert len(workers.reads.under_way) == READS_AT_ONCE
    # Silent, asked, and asked in vain; whether it can be connected to is asked in real time.
    workers.until(len(names), step_s=0.1, within_s=2 * TIMEOUT_S)
    assert workers.failed == set(names)
    assert workers.connection is None
    assert not workers.reads.under_way


def test_a_peer_that_answers_and_moves_nothing_is_given_up(workers: Workers) -> None:
    workers.reads.bytes_per_s = 0.0
    workers.channel.stop()
    workers.ask_for(["lost"])
    workers.step(TIMEOUT_S * 0.9)
    for _ in range(5):
        workers.step(TIMEOUT_S)
    assert len(workers.reads.under_way) == 1
    workers.until(1, step_s=0.5, within_s=20 * TIMEOUT_S)
    assert workers.failed == {"lost"}


def test_a_read_that_cannot_be_cancelled_at_once_is_cancelled_later(workers: Workers) -> None:
    workers.reads.silent = True
    workers.reads.sticks = 3
    workers.channel.stop()
    workers.ask_for(["stuck"])
    workers.until(1, step_s=0.1, within_s=4 * TIMEOUT_S)
    assert workers.failed == {"stuck"}
    assert not workers.reads.under_way
    # Of two attempts one did not end well, and the other found nobody.
    assert workers.num_failures == 2
    assert len(workers.decode.xfer_stats.data["num_failed_transfers"]) == 1


def test_a_read_that_has_failed_and_stands_is_one_failure(workers: Workers) -> None:
    workers.reads.fails = workers.reads.sticks = 3
    workers.ask_for(["stuck"])
    workers.until(1, step_s=0.02, within_s=4 * TIMEOUT_S)
    assert workers.failed == set()
    assert workers.num_failures == 1


def test_after_an_error_the_others_are_read_over_a_new_connection(workers: Workers) -> None:
    names = [f"request {number:03d}" for number in range(40)]
    connection = workers.connection
    workers.reads.fails = 1
    workers.ask_for(names)
    workers.until(len(names), step_s=0.02, within_s=120)
    assert workers.failed == set()
    assert sorted(workers.finished) == names
    assert workers.connection is not connection
    assert workers.num_failures == 1


def test_peers_that_do_not_answer_keep_no_other_from_a_new_connection(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = {f"lost {number}" for number in range(8)}
    given_up = threading.Event()

    def fetch_or_wait(*where: Any, engine_id: str, **how: Any) -> Any:
        if engine_id in lost:
            given_up.wait(60)
            raise PeerTimeout("no answer")
        return fetch_payloads(*where, engine_id=engine_id, **how)

    monkeypatch.setattr(worker, "fetch_payloads", fetch_or_wait)
    for engine_id in lost:
        assert workers.decode.warm_up(engine_id, HOST, 1, 1) == (False, None)
    connection = workers.connection
    workers.reads.fails = 1
    workers.ask_for(["a", "b"])
    try:
        workers.until(2, step_s=0.02, within_s=60, beside=lost)
        assert workers.decode._handshake_futures.keys() == lost
    finally:
        given_up.set()
    assert workers.failed == set()
    assert workers.connection is not connection
