"""Routing policies: tables from a snapshot to a replica."""

import random

import pytest

from router.policies import POLICIES, PoolSnapshot, ReplicaLoad, num_candidates


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


def test_random_picks_every_replica() -> None:
    rng = random.Random(0)
    picked = {POLICIES["random"](snapshot(5.0, 0.0, 9.0), rng).replica_id for _ in range(100)}
    assert picked == {"r0", "r1", "r2"}


@pytest.mark.parametrize("policy", POLICIES)
def test_every_plan_has_a_reason(policy: str) -> None:
    assert POLICIES[policy](snapshot(1.0, 2.0), random.Random(0)).reason
