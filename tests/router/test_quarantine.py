"""Suspects wait in order, and each is in a replica of its own."""

from router.quarantine import Quarantine


def test_suspects_wait_in_order_until_they_enter() -> None:
    quarantine: Quarantine[str] = Quarantine()
    for each in ("a", "b", "c"):
        quarantine.wait(each)
    assert quarantine.next == "a"
    quarantine.enter("a", "d0")
    quarantine.enter("b", "d1")
    assert (quarantine.next, quarantine.occupied) == ("c", frozenset({"d0", "d1"}))
    assert list(quarantine.waiting) == ["c"]


def test_who_leaves_frees_the_replica() -> None:
    quarantine: Quarantine[str] = Quarantine()
    quarantine.wait("a")
    quarantine.enter("a", "d0")
    quarantine.wait("b")
    assert quarantine.leave("a")
    assert quarantine.leave("b")
    assert (quarantine.next, quarantine.occupied) == (None, frozenset())


def test_one_that_has_lost_its_replica_waits_behind_the_others() -> None:
    quarantine: Quarantine[str] = Quarantine()
    quarantine.wait("a")
    quarantine.enter("a", "d0")
    quarantine.wait("b")
    quarantine.wait("a")
    assert (list(quarantine.waiting), quarantine.occupied) == (["b", "a"], frozenset())


def test_who_is_no_suspect_changes_nothing() -> None:
    quarantine: Quarantine[str] = Quarantine()
    quarantine.wait("a")
    assert not quarantine.leave("innocent")
    assert quarantine.next == "a"
