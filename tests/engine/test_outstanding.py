"""What a replica tells each sender of the others' work."""

import pytest

from engine.outstanding import OutstandingWork


def test_each_is_told_what_the_others_have_sent() -> None:
    work: OutstandingWork[str] = OutstandingWork()
    work.add("a", 1.0)
    work.add("b", 2.0)
    work.add("a", 0.5)
    assert work.total_s == 3.5
    told = {sender: work.others_s(sender) for sender in ("a", "b", "new")}
    assert told == {"a": 2.0, "b": 1.5, "new": 3.5}


def test_what_has_ended_and_who_is_gone_count_no_more() -> None:
    work: OutstandingWork[str] = OutstandingWork()
    for _ in range(3):
        work.add("a", 0.1)
    work.add("b", 2.0)
    for _ in range(3):
        work.complete("a", 0.1)
    assert work.others_s("b") == pytest.approx(0.0, abs=1e-12)
    assert work.others_s("b") >= 0.0
    work.forget("b")
    assert work.others_s("a") == 0.0
