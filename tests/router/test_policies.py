"""Routing policies: tables from a snapshot to a replica."""

import math
import random
from collections import Counter

import pytest

from router.policies import (
    POLICIES,
    PoolSnapshot,
    ReplicaLoad,
    num_candidates,
    predicted_work_s,
)


def snapshot(*work_s: float, turn: int = 0, num_routers: int = 1) -> PoolSnapshot:
    """Replicas r0, r1, ... with these seconds of work."""
    replicas = tuple(
        ReplicaLoad(replica_id=f"r{index}", work_s=work) for index, work in enumerate(work_s)
    )
    return PoolSnapshot(replicas=replicas, turn=turn, num_routers=num_routers)


@pytest.mark.parametrize(
    ("policy", "load", "expected"),
    [
        pytest.param("p2c", snapshot(1.0), "r0", id="p2c-alone"),
        pytest.param("p2c", snapshot(1.0, 0.5), "r1", id="p2c-less-work"),
        pytest.param("p2c", snapshot(0.5, 0.5), "r0", id="p2c-tie-by-id"),
        pytest.param("least_work", snapshot(3.0, 1.0, 2.0), "r1", id="least-of-all"),
        pytest.param("least_work", snapshot(1.0, 1.0), "r0", id="least-tie-by-id"),
        pytest.param("round_robin", snapshot(9.0, 0.0, 0.0), "r0", id="turn-0"),
        pytest.param("round_robin", snapshot(9.0, 0.0, 0.0, turn=4), "r1", id="turn-4"),
        pytest.param("random", snapshot(7.0), "r0", id="random-alone"),
    ],
)
def test_picks(policy: str, load: PoolSnapshot, expected: str) -> None:
    assert POLICIES[policy](load, random.Random(0)).replica_id == expected


def test_p2c_compares_some_of_many_and_all_of_few() -> None:
    assert num_candidates(num_routers=16, num_replicas=16) == 16
    assert num_candidates(num_routers=16, num_replicas=1000) == 64
    assert num_candidates(num_routers=1, num_replicas=1000) == 1000


def test_p2c_of_many_replicas_finds_one_of_the_least_loaded() -> None:
    crowd = snapshot(*(float(index) for index in range(640)), num_routers=2)
    picked = {int(POLICIES["p2c"](crowd, random.Random(seed)).replica_id[1:]) for seed in range(50)}
    assert len(picked) > 10, "routers do not all go to the same"
    assert max(picked) < 100


def shared(loads: dict[str, tuple[float, float]], *, now_s: float = 10.0) -> PoolSnapshot:
    """Replicas with their work and the age of its report; others send 4 s of work a second."""
    return PoolSnapshot(
        replicas=tuple(
            ReplicaLoad(replica_id=key, work_s=work_s, counted_s=now_s, reported_s=now_s - age_s)
            for key, (work_s, age_s) in loads.items()
        ),
        now_s=now_s,
        mean_work_s=2.0,
        num_routers=5,
        others_work_per_s=4.0,
    )


@pytest.mark.parametrize(
    ("age_s", "expected_s"),
    [
        pytest.param(0.0, 1.0, id="just-reported"),
        pytest.param(0.001, 1.002, id="at-first-what-others-send-to-each-of-two"),
        pytest.param(1.0, 1.0 + 2.0 * (1 - 1 / math.e), id="less-and-less"),
        pytest.param(1000.0, 3.0, id="in-the-end-as-much-as-others-have"),
    ],
)
def test_an_old_report_leaves_out_what_others_have_sent(age_s: float, expected_s: float) -> None:
    pool = shared({"a": (1.0, age_s), "b": (9.0, 0.0)})
    assert predicted_work_s(pool.replicas[0], pool) == pytest.approx(expected_s, rel=1e-5)


def picks(pool: PoolSnapshot) -> Counter[str]:
    rng = random.Random(0)
    return Counter(POLICIES["p2c"](pool, rng).replica_id for _ in range(1000))


def test_an_idle_replica_that_others_have_heard_of_too_is_not_the_only_choice() -> None:
    picked = picks(shared({"a": (0.0, 1.0), "b": (0.1, 1.0), "c": (9.0, 1.0)}))
    assert picked["a"] > picked["b"] > 100
    assert picked["c"] == 0


def test_an_idle_replica_of_which_only_this_router_has_heard_is_taken() -> None:
    assert picks(shared({"a": (0.0, 0.0), "b": (0.1, 1.0), "c": (9.0, 1.0)})) == {"a": 1000}
    fresh = picks(shared({"a": (0.0, 0.02), "b": (0.1, 1.0), "c": (9.0, 1.0)}))
    assert fresh == {"a": 1000}


def test_random_picks_every_replica() -> None:
    rng = random.Random(0)
    picked = {POLICIES["random"](snapshot(5.0, 0.0, 9.0), rng).replica_id for _ in range(100)}
    assert picked == {"r0", "r1", "r2"}


@pytest.mark.parametrize("policy", POLICIES)
def test_every_plan_has_a_reason(policy: str) -> None:
    assert POLICIES[policy](snapshot(1.0, 2.0), random.Random(0)).reason
