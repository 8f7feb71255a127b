"""What transfers are predicted to take, by what was measured of the pair or of others like it."""

import random

import pytest

from router.ledger import Ledger
from router.policies import MAX_CANDIDATES, POLICIES, PoolSnapshot, ReplicaLoad
from router.transfer_fit import Reads, TransferCost, TransferFit
from router.transfers import STALE_S, WITHIN_NODE, TransferEstimate, Transfers

MB = 1_000_000
FAST = TransferCost(fixed_s=0.5e-3, per_byte_s=1 / 50e9)
SLOW = TransferCost(fixed_s=2e-3, per_byte_s=1 / 1e9)


def reads(cost: TransferCost, *sizes: float, noise: float = 1.0) -> Reads:
    seconds = noise * sum(cost.seconds(size) for size in sizes)
    return Reads(num=len(sizes), num_bytes=int(sum(sizes)), seconds=seconds)


@pytest.mark.parametrize("true", [FAST, SLOW, TransferCost(), TransferCost().times(100)])
@pytest.mark.parametrize(("num_at_once", "within"), [(1, 0.2), (4, 0.5)])
def test_a_fit_finds_what_reads_of_all_sizes_take(
    true: TransferCost, num_at_once: int, within: float
) -> None:
    rng = random.Random(0)
    fit = TransferFit()
    for _ in range(100):
        sizes = [10 ** rng.uniform(4, 9) for _ in range(num_at_once)]
        cost = fit.observe(reads(true, *sizes, noise=rng.uniform(0.8, 1.25)), TransferCost())
    for num_bytes in (1e4, 1e6, 1e8, 1e9):
        assert cost.seconds(num_bytes) == pytest.approx(true.seconds(num_bytes), rel=within)


def test_a_fit_of_one_size_is_right_there_and_keeps_the_proportions_elsewhere() -> None:
    prior = TransferCost()
    fit = TransferFit()
    for _ in range(50):
        cost = fit.observe(reads(prior.times(30), MB), prior)
    for num_bytes in (1e4, 1e6, 1e9):
        assert cost.seconds(num_bytes) == pytest.approx(30 * prior.seconds(num_bytes), rel=1e-6)


def test_a_read_that_stalled_counts_for_little() -> None:
    rng = random.Random(0)
    fit = TransferFit()
    for number in range(60):
        stalled = 50.0 if number % 20 == 7 else 1.0
        some = reads(SLOW, 10 ** rng.uniform(5, 8), noise=stalled)
        cost = fit.observe(some, TransferCost())
    assert cost.seconds(10 * MB) == pytest.approx(SLOW.seconds(10 * MB), rel=0.35)


@pytest.mark.parametrize("change", [0.1, 10.0])
@pytest.mark.parametrize("spread", [0, 1.5])
def test_a_way_that_gets_slow_or_fast_is_noticed_soon(change: float, spread: float) -> None:
    rng = random.Random(0)
    fit = TransferFit()
    now = SLOW.times(change)
    for number in range(140):
        true = SLOW if number < 100 else now
        size = 10 ** (7 + rng.uniform(-spread, spread))
        cost = fit.observe(reads(true, size, noise=rng.uniform(0.8, 1.25)), TransferCost())
    for num_bytes in (10 ** (7 - spread), 10 ** (7 + spread)):
        assert cost.seconds(num_bytes) == pytest.approx(now.seconds(num_bytes), rel=0.35)


def test_no_cost_is_ever_negative() -> None:
    rng = random.Random(1)
    for _ in range(200):
        fit = TransferFit(trust=rng.choice([0.0, 1.0]))
        for _ in range(rng.randint(1, 10)):
            some = Reads(
                num=rng.randint(1, 5),
                num_bytes=rng.choice([0, 1, 10**3, 10**6, 10**9]),
                seconds=10 ** rng.uniform(-7, 3),
            )
            cost = fit.observe(some, TransferCost())
            assert cost.fixed_s >= 0
            assert cost.per_byte_s >= 0
            assert cost.seconds(1e6) > 0


def two_nodes() -> Transfers:
    """A prefill and two decodes on node 1, one prefill and one decode on node 2."""
    transfers = Transfers()
    for replica_id, node_id in (("p1", "1"), ("d1", "1"), ("d1b", "1"), ("p2", "2"), ("d2", "2")):
        transfers.insert(replica_id, node_id)
    return transfers


def observe(
    transfers: Transfers, prefill: str, decode: str, cost: TransferCost, *, now_s: float = 0.0
) -> None:
    for size in (1e5, 1e6, 1e7, 1e8) * 10:
        transfers.observe(reads(cost, size), prefill=prefill, decode=decode, now_s=now_s)


def seconds(
    transfers: Transfers, prefill: str, decode: str, *, num_bytes: float = 1e7, now_s: float = 0.0
) -> float:
    return transfers.estimate(prefill, num_bytes=num_bytes, num_steps=1, now_s=now_s).seconds(
        decode
    )


def test_with_nothing_measured_a_node_of_its_own_is_nearer() -> None:
    transfers = two_nodes()
    assert seconds(transfers, "p1", "d2") == TransferCost().seconds(1e7)
    assert seconds(transfers, "p1", "d1") == WITHIN_NODE * TransferCost().seconds(1e7)


def test_a_pair_is_known_by_its_own_reads_and_others_by_those_of_their_kind() -> None:
    transfers = two_nodes()
    observe(transfers, "p1", "d1", FAST)
    observe(transfers, "p1", "d2", SLOW)
    for num_bytes in (1e5, 1e7, 1e9):
        for prefill, decode, cost in (
            ("p1", "d1", FAST),
            ("p1", "d1b", FAST),
            ("p2", "d2", FAST),
            ("p1", "d2", SLOW),
            ("p2", "d1", SLOW),
        ):
            expected_s = cost.seconds(num_bytes)
            found_s = seconds(transfers, prefill, decode, num_bytes=num_bytes)
            assert found_s == pytest.approx(expected_s, rel=0.15), (prefill, decode)


def test_a_kind_that_was_not_seen_is_known_by_all() -> None:
    transfers = two_nodes()
    observe(transfers, "p1", "d2", SLOW)
    assert seconds(transfers, "p2", "d1") == pytest.approx(SLOW.seconds(1e7), rel=0.1)
    assert seconds(transfers, "p1", "d1") == pytest.approx(0.5 * SLOW.seconds(1e7), rel=0.1)


def test_one_read_does_not_say_all_of_a_pair() -> None:
    transfers = two_nodes()
    observe(transfers, "p1", "d1", FAST)
    once = reads(FAST, 1e7, noise=100.0)
    transfers.observe(once, prefill="p1", decode="d1b", now_s=0.0)
    usual_s = FAST.seconds(1e7)
    assert 2 * usual_s < seconds(transfers, "p1", "d1b") < 50 * usual_s


def test_a_pair_that_was_slow_is_tried_again_later() -> None:
    transfers = two_nodes()
    observe(transfers, "p1", "d1b", SLOW)
    observe(transfers, "p1", "d1", FAST, now_s=STALE_S)
    assert seconds(transfers, "p1", "d1b", now_s=STALE_S) > 5 * seconds(
        transfers, "p1", "d1", now_s=STALE_S
    )
    later_s = STALE_S + 1
    observe(transfers, "p1", "d1", FAST, now_s=later_s)
    assert seconds(transfers, "p1", "d1b", now_s=later_s) == pytest.approx(
        FAST.seconds(1e7), rel=0.1
    )


def test_nothing_is_left_of_replicas_that_went() -> None:
    transfers = two_nodes()
    observe(transfers, "p1", "d1", SLOW)
    observe(transfers, "p1", "d2", SLOW)
    for replica_id in ("p1", "d1", "d1b", "p2", "d2"):
        transfers.remove(replica_id)
    observe(transfers, "p1", "d1", SLOW)
    assert not transfers._nodes
    assert not transfers._on_node
    assert not transfers._pairs


def snapshot(
    *works: tuple[str, float], transfer: TransferEstimate | None, num_routers: int = 1
) -> PoolSnapshot:
    return PoolSnapshot(
        replicas=tuple(ReplicaLoad(replica_id=key, work_s=work_s) for key, work_s in works),
        num_routers=num_routers,
        transfer=transfer,
    )


@pytest.mark.parametrize("policy", ["p2c", "least_work"])
@pytest.mark.parametrize(
    ("works", "num_steps", "expected"),
    [
        pytest.param((0.010, 0.010), 100, "d2", id="work-alike"),
        pytest.param((0.010, 0.0102), 100, "d2", id="little-more-work"),
        pytest.param((0.010, 0.011), 100, "d1", id="more-work-over-a-long-answer"),
        pytest.param((0.010, 0.011), 10, "d2", id="a-short-answer-has-its-kv-sooner"),
    ],
)
def test_the_first_to_be_done_with_what_the_kv_takes(
    policy: str, works: tuple[float, float], num_steps: int, expected: str
) -> None:
    transfers = two_nodes()
    observe(transfers, "p2", "d1", SLOW)
    observe(transfers, "p2", "d2", FAST)
    transfer = transfers.estimate("p2", num_bytes=5e7, num_steps=num_steps, now_s=0.0)
    pool = snapshot(("d1", works[0]), ("d2", works[1]), transfer=transfer)
    assert POLICIES[policy](pool, random.Random(0)).replica_id == expected


def test_work_decides_where_all_ways_are_alike() -> None:
    rng = random.Random(0)
    transfers = Transfers()
    transfer = transfers.estimate("p", num_bytes=1e7, num_steps=10, now_s=0.0)
    for _ in range(200):
        works = [(f"d{index}", rng.choice([0.0, 0.1, rng.random()])) for index in range(5)]
        with_kv, without = (
            POLICIES["p2c"](snapshot(*works, transfer=each), rng).replica_id
            for each in (transfer, None)
        )
        assert with_kv == without


def test_what_is_on_the_node_is_compared_whatever_chance_picks() -> None:
    ledger, transfers = Ledger(num_routers=4, drains=False), Transfers()
    transfers.insert("p", "1")
    for index in range(20 * MAX_CANDIDATES):
        ledger.insert(f"d{index}", 0.0)
        transfers.insert(f"d{index}", "1" if index in (700, 701) else f"other{index}")
    transfer = transfers.estimate("p", num_bytes=1e8, num_steps=10, now_s=0.0)
    rng = random.Random(0)
    picked = {
        POLICIES["p2c"](ledger.snapshot(0.0, transfer=transfer), rng).replica_id for _ in range(50)
    }
    assert picked == {"d700"}
    ledger.add("d700", "r", 1.0, now_s=0.0)
    barred = {"d701"}
    plan = POLICIES["p2c"](ledger.snapshot(0.0, transfer=transfer, barred=barred), rng)
    assert plan.replica_id not in ("d700", "d701")
