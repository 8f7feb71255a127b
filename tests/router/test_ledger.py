"""What a router knows of the work in a pool, event by event."""

import math
from collections.abc import Callable

import pytest

from engine.lateness import PUT_BACK_S
from router.ledger import RATE_TIME_S, Ledger
from router.policies import PoolSnapshot, predicted_work_s


def ledger_of(*replica_ids: str, drains: bool = True, num_routers: int = 1) -> Ledger:
    ledger = Ledger(drains=drains, num_routers=num_routers)
    for replica_id in replica_ids:
        ledger.insert(replica_id, 0.0)
    return ledger


def work(snapshot: PoolSnapshot) -> dict[str, float]:
    return {load.replica_id: predicted_work_s(load, snapshot) for load in snapshot.replicas}


def test_what_is_sent_counts_and_is_done_at_a_second_a_second() -> None:
    ledger = ledger_of("a", "b")
    ledger.add("a", "r1", 3.0, now_s=0.0)
    assert work(ledger.snapshot(0.0)) == {"a": 3.0, "b": 0.0}
    assert work(ledger.snapshot(1.0)) == {"a": 2.0, "b": 0.0}
    assert work(ledger.snapshot(9.0)) == {"a": 0.0, "b": 0.0}


def test_a_report_brings_the_work_of_others_and_the_progress() -> None:
    ledger = ledger_of("a")
    ledger.add("a", "r1", 3.0, now_s=0.0)
    ledger.report("a", others_work_s=5.0, progress_s=1.0, now_s=2.0)
    assert work(ledger.snapshot(2.0)) == {"a": 7.0}


def test_what_was_sent_while_a_report_was_under_way_is_not_lost() -> None:
    ledger = ledger_of("a")
    ledger.add("a", "r1", 3.0, now_s=0.0)
    ledger.report("a", others_work_s=0.0, progress_s=0.0, now_s=0.0)
    ledger.report("a", others_work_s=0.0, progress_s=0.0, now_s=0.0)
    assert work(ledger.snapshot(0.0)) == {"a": 3.0}


def test_a_request_that_was_not_done_takes_its_work_with_it() -> None:
    ledger = ledger_of("a")
    for request_id in ("r1", "r2"):
        ledger.add("a", request_id, 3.0, now_s=0.0)
    ledger.complete("a", "r1", was_done=False)
    assert work(ledger.snapshot(0.0)) == {"a": 3.0}
    ledger.complete("a", "r1", was_done=False)
    assert work(ledger.snapshot(0.0)) == {"a": 3.0}, "only once"


def test_in_decode_work_stays_until_its_request_ends() -> None:
    ledger = ledger_of("a", drains=False)
    ledger.add("a", "r1", 0.5, now_s=0.0)
    ledger.report("a", others_work_s=0.25, progress_s=9.0, now_s=1.0)
    assert work(ledger.snapshot(60.0)) == {"a": 0.75}
    ledger.complete("a", "r1")
    assert work(ledger.snapshot(60.0)) == {"a": 0.25}
    assert ledger.num_outstanding == 0


def test_what_is_sent_late_is_not_done_before() -> None:
    ledger = ledger_of("a")
    ledger.add("a", "r1", 3.0, now_s=0.0)
    ledger.add("a", "r2", 3.0, now_s=10.0)
    assert work(ledger.snapshot(11.0)) == {"a": 2.0}


def test_others_are_taken_to_send_as_much_as_this_router_has_lately() -> None:
    ledger = ledger_of("a", "b", num_routers=3)
    assert ledger.snapshot(0.0).others_work_per_s == 0.0
    for request_id in ("r1", "r2"):
        ledger.add("a", request_id, RATE_TIME_S, now_s=0.0)
    assert ledger.snapshot(0.0).others_work_per_s == pytest.approx(4.0)
    assert ledger.snapshot(RATE_TIME_S).others_work_per_s == pytest.approx(4.0 / math.e)
    assert ledger_of("a").snapshot(0.0).others_work_per_s == 0.0


@pytest.mark.parametrize(
    "leave", [lambda ledger: ledger.close("a"), lambda ledger: ledger.remove("a")]
)
def test_a_replica_that_leaves_is_not_offered(leave: Callable[[Ledger], None]) -> None:
    ledger = ledger_of("a", "b")
    ledger.report("a", others_work_s=8.0, progress_s=0.0, now_s=0.0)
    leave(ledger)
    snapshot = ledger.snapshot(0.0, cached={"a": (10, 0.1), "b": (10, 0.1)})
    assert [load.replica_id for load in snapshot.replicas] == ["b"]
    assert [hit.load.replica_id for hit in snapshot.hits] == ["b"]
    assert ledger.mean_work_s == 0.0


def test_a_replica_that_stays_after_all_has_what_it_had() -> None:
    ledger = ledger_of("a", "b")
    ledger.report("a", others_work_s=8.0, progress_s=0.0, now_s=0.0)
    ledger.close("a")
    ledger.reopen("a")
    assert work(ledger.snapshot(0.0)) == {"a": 8.0, "b": 0.0}
    assert ledger.mean_work_s == 4.0


def test_what_is_outstanding_is_counted_wherever_it_ends() -> None:
    ledger = ledger_of("a", "b")
    for number, replica_id in enumerate("aabb"):
        ledger.add(replica_id, f"r{number}", 1.0, now_s=0.0)
    ledger.complete("a", "r0")
    assert (ledger.num_outstanding, ledger.num_sent("a")) == (3, 1)
    ledger.remove("b")
    assert ledger.num_outstanding == 1


def test_late_words_of_a_replica_that_is_gone_change_nothing() -> None:
    ledger = ledger_of("a", "b")
    ledger.remove("a")
    ledger.report("a", others_work_s=8.0, progress_s=0.0, now_s=0.0)
    ledger.complete("a", "r1")
    ledger.reopen("a")
    assert work(ledger.snapshot(0.0)) == {"b": 0.0}


def test_new_work_does_not_wait_for_what_is_late() -> None:
    ledger = ledger_of("a")
    ledger.add("a", "r1", 3.0, now_s=0.0, deadline_s=5.0)
    ledger.add("a", "r2", 4.0, now_s=1.0, deadline_s=9.0)
    ledger.report("a", others_work_s=0.0, progress_s=0.0, now_s=4.0)
    assert work(ledger.snapshot(4.0)) == {"a": 7.0}
    ledger.report("a", others_work_s=0.0, progress_s=0.0, now_s=5.0)
    assert work(ledger.snapshot(5.0)) == {"a": 4.0}
    ledger.report("a", others_work_s=0.0, progress_s=0.0, now_s=5.0 + PUT_BACK_S)
    assert work(ledger.snapshot(5.0 + PUT_BACK_S)) == {"a": 3.0}, "r1 is due again, r2 is late"
    ledger.complete("a", "r1")
    ledger.report("a", others_work_s=0.0, progress_s=0.0, now_s=8.0)
    assert work(ledger.snapshot(8.0)) == {"a": 4.0}, "taken off once"
    assert ledger.num_outstanding == 1


def test_what_has_no_deadline_is_never_late() -> None:
    ledger = ledger_of("a", drains=False)
    ledger.add("a", "r1", 0.5, now_s=0.0)
    ledger.report("a", others_work_s=0.0, progress_s=0.0, now_s=1000.0)
    assert work(ledger.snapshot(1000.0)) == {"a": 0.5}
