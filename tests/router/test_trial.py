"""Suspects take turns."""

from router.trial import Trial


def test_one_suspect_at_a_time_in_order() -> None:
    trial: Trial[str] = Trial()
    assert [trial.takes(each) for each in ("a", "b", "c")] == [True, False, False]
    assert [each for each in trial.acquit("a") if trial.takes(each)] == ["b"]
    assert [each for each in trial.acquit("b") if trial.takes(each)] == ["c"]


def test_one_that_moves_while_it_is_tried_need_not_wait() -> None:
    trial: Trial[str] = Trial()
    assert trial.takes("a")
    assert trial.takes("a")


def test_others_change_nothing() -> None:
    trial: Trial[str] = Trial()
    trial.takes("a")
    trial.takes("b")
    assert list(trial.acquit("innocent")) == []
    assert list(trial.leave("innocent")) == []


def test_one_that_ends_while_it_waits_does_not_come_up() -> None:
    trial: Trial[str] = Trial()
    for each in ("a", "b", "c"):
        trial.takes(each)
    assert list(trial.leave("b")) == []
    assert [each for each in trial.leave("a") if trial.takes(each)] == ["c"]


def test_one_that_is_not_tried_after_all_does_not_keep_the_next_waiting() -> None:
    trial: Trial[str] = Trial()
    for each in ("a", "b", "c"):
        trial.takes(each)
    assert list(trial.leave("a")) == ["b", "c"]
