"""Leases: what may be read, and when vLLM may free it."""

from collections.abc import Callable

import pytest

from kvtransfer.p2p_leases import Ended, Leases

EXTENSION_S = 20.0


def held(request_id: str = "r", lease_id: int = 1, expiry_s: float = 30.0) -> Leases:
    leases = Leases(extension_s=EXTENSION_S)
    leases.admit({request_id: lease_id})
    leases.hold(request_id, expiry_s=expiry_s)
    return leases


def ended(*read_or_released: str, expired: tuple[str, ...] = ()) -> Ended:
    return Ended(read_or_released=frozenset(read_or_released), expired=frozenset(expired))


@pytest.mark.parametrize(
    ("events", "now_s", "expected"),
    [
        pytest.param([], 29.9, ended(), id="before its time"),
        pytest.param([], 30.0, ended(expired=("r",)), id="its time is up"),
        pytest.param([lambda x: x.finish("r", 1)], 0, ended("r"), id="read"),
        pytest.param([lambda x: x.finish("r", 2)], 0, ended(), id="another lease was read"),
        pytest.param([lambda x: x.finish("q", 1)], 0, ended(), id="unknown request was read"),
        pytest.param([lambda x: x.release(["r", "q"])], 0, ended("r"), id="released"),
        pytest.param([lambda x: x.pin("r", 1)], 99, ended(), id="being read past its time"),
        pytest.param(
            [lambda x: x.pin("r", 1), lambda x: x.release(["r"])], 0, ended(), id="released in use"
        ),
        pytest.param(
            [lambda x: x.pin("r", 1), lambda x: x.pin("r", 1), lambda x: x.unpin("r")],
            99,
            ended(),
            id="one of two still reads",
        ),
        pytest.param(
            [lambda x: x.pin("r", 1), lambda x: x.release(["r"]), lambda x: x.unpin("r")],
            0,
            ended("r"),
            id="released, then no longer in use",
        ),
        pytest.param(
            [lambda x: x.pin("r", 1), lambda x: x.unpin("r")],
            99,
            ended(expired=("r",)),
            id="a failed read keeps nothing",
        ),
        pytest.param(
            [lambda x: x.extend(["r", "q"], now_s=25.0)], 44.9, ended(), id="heartbeat extends"
        ),
        pytest.param(
            [lambda x: x.extend(["r"], now_s=1.0)], 29.9, ended(), id="heartbeat never shortens"
        ),
        pytest.param([lambda x: x.drop(["r"])], 99, ended(), id="aborted: vLLM frees it itself"),
    ],
)
def test_what_ends(events: list[Callable[[Leases], object]], now_s: float, expected: Ended) -> None:
    leases = held()
    for event in events:
        event(leases)
    assert leases.collect(now_s=now_s) == expected


@pytest.mark.parametrize("end", [Leases.release, lambda x, ids: x.finish(ids[0], 1)])
def test_an_end_before_the_lease_runs_waits_for_it(
    end: Callable[[Leases, list[str]], None],
) -> None:
    leases = Leases(extension_s=EXTENSION_S)
    leases.admit({"r": 1})
    end(leases, ["r"])
    assert leases.collect(now_s=0) == ended()
    leases.hold("r", expiry_s=30)
    assert leases.collect(now_s=0) == ended("r")
    assert leases.collect(now_s=99) == ended()


@pytest.mark.parametrize(
    ("events", "lease_id", "granted"),
    [
        pytest.param([], 1, True, id="held"),
        pytest.param([], 2, False, id="another lease"),
        pytest.param([lambda x: x.collect(now_s=30)], 1, False, id="expired"),
        pytest.param([lambda x: x.release(["r"])], 1, False, id="released"),
        pytest.param([lambda x: x.drop(["r"])], 1, False, id="aborted"),
        pytest.param(
            [lambda x: x.collect(now_s=30), lambda x: x.admit({"r": 2})],
            1,
            False,
            id="the same name again, under a new lease",
        ),
    ],
)
def test_what_may_be_read(
    events: list[Callable[[Leases], object]], lease_id: int, granted: bool
) -> None:
    leases = held()
    for event in events:
        event(leases)
    assert leases.pin("r", lease_id) is granted


def test_a_request_may_be_read_before_its_lease_runs() -> None:
    """The params reach decode before prefill's next step."""
    leases = Leases(extension_s=EXTENSION_S)
    leases.admit({"r": 1})
    assert leases.pin("r", 1)
