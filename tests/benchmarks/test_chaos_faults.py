"""Which fault comes next, and whom it may hit."""

import random
from collections import Counter

import pytest

from benchmarks.chaos_faults import DESCRIPTIONS, Fault, FaultOrder, Kind, Member, live_members
from kvtransfer.phase import Phase

BOTH: dict[Phase, int] = {"prefill": 2, "decode": 2}
NONE: dict[Phase, int] = {"prefill": 0, "decode": 0}
NUM_IN_ROUND = 17


def order(seed: int = 0, *, spare_last: bool = False) -> FaultOrder:
    return FaultOrder(random.Random(seed), spare_last=spare_last)


def deal(
    faults: FaultOrder, num_live: dict[Phase, int], times: int, *, num_routers: int = 2
) -> list[Fault]:
    dealt = [faults.next(num_live, num_routers=num_routers) for _ in range(times)]
    assert None not in dealt
    return [fault for fault in dealt if fault is not None]


def test_every_kind_is_described() -> None:
    assert set(DESCRIPTIONS) == set(Kind)


def test_a_round_has_every_kind() -> None:
    counts = Counter(fault.kind for fault in deal(order(), BOTH, NUM_IN_ROUND))

    assert set(counts) == set(Kind)
    assert counts[Kind.KILL_REPLICA] == counts[Kind.KILL_ENGINE] == 2


def test_the_seed_decides() -> None:
    assert deal(order(1), BOTH, 30) == deal(order(1), BOTH, 30)
    assert deal(order(1), BOTH, 30) != deal(order(2), BOTH, 30)


def test_both_pools_are_hit() -> None:
    hit = {fault.pool for fault in deal(order(), BOTH, 30) if fault.kind.hits_pool}

    assert hit == {"prefill", "decode"}


@pytest.mark.parametrize(
    ("num_live", "spare_last", "expected"),
    [
        pytest.param({"prefill": 2, "decode": 1}, False, {"prefill"}, id="the one with more"),
        pytest.param({"prefill": 0, "decode": 1}, False, {"decode"}, id="not one without any"),
        pytest.param({"prefill": 1, "decode": 2}, True, {"decode"}, id="not the last, if spared"),
        pytest.param({"prefill": 1, "decode": 1}, True, set(), id="both are down to the last"),
        pytest.param(NONE, False, set(), id="nobody left"),
    ],
)
def test_the_pool(num_live: dict[Phase, int], spare_last: bool, expected: set[Phase]) -> None:
    kinds = [kind for kind in Kind if kind is not Kind.CROWD]
    dealt = deal(FaultOrder(random.Random(0), kinds, spare_last=spare_last), num_live, 30)

    assert {fault.pool for fault in dealt if fault.kind.hits_pool} == expected
    assert all((fault.pool is not None) is fault.kind.hits_pool for fault in dealt)


def test_what_cannot_be_used_now_comes_later() -> None:
    faults = order()
    first = deal(faults, NONE, 4, num_routers=1)
    rest = deal(faults, BOTH, NUM_IN_ROUND - 4)

    assert all(fault.kind.is_of_clients or fault.kind.is_of_node for fault in first)
    assert not {fault.kind for fault in first} & {fault.kind for fault in rest}


def test_a_crowd_is_for_decode() -> None:
    faults = FaultOrder(random.Random(0), [Kind.CROWD])

    assert faults.next({"prefill": 2, "decode": 0}, num_routers=2) is None
    assert faults.next({"prefill": 2, "decode": 1}, num_routers=2) == Fault(
        kind=Kind.CROWD, pool="decode"
    )


def test_the_last_router_is_left_alone() -> None:
    kinds = {fault.kind for fault in deal(order(), BOTH, 30, num_routers=1)}

    assert kinds == set(Kind) - {Kind.KILL_ROUTER}


def test_nothing_that_could_be_used() -> None:
    faults = FaultOrder(random.Random(0), [Kind.KILL_ENGINE])

    assert faults.next(NONE, num_routers=1) is None
    assert faults.next(BOTH, num_routers=1) is not None


OLD = Member(pid=1, created_s=1.0, engine_pid=11)
NEW = Member(pid=2, created_s=2.0, engine_pid=12)
NEWEST = Member(pid=3, created_s=3.0, engine_pid=13)
WITHOUT_ENGINE = Member(pid=4, created_s=0.5, engine_pid=None)


@pytest.mark.parametrize(
    ("members", "num_live", "already_hit", "expected"),
    [
        pytest.param([NEW, OLD], 2, set(), (OLD, NEW), id="all"),
        pytest.param([NEWEST, OLD, NEW], 2, set(), (OLD, NEW), id="the newest still starts"),
        pytest.param([OLD, NEW], 2, {1}, (NEW,), id="the router has not noticed yet"),
        pytest.param([OLD, NEW, NEWEST], 2, {1}, (NEW, NEWEST), id="replaced, not gone yet"),
        pytest.param([WITHOUT_ENGINE, OLD], 2, set(), (OLD,), id="no engine yet"),
        pytest.param([OLD, NEW], 0, set(), (), id="the router knows of none"),
    ],
)
def test_live_members(
    members: list[Member], num_live: int, already_hit: set[int], expected: tuple[Member, ...]
) -> None:
    found = live_members(members, num_live=num_live, already_hit=frozenset(already_hit))

    assert found == expected
