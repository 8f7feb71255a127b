"""Routing policies: tables from a snapshot to a replica."""

import random
from collections import Counter

import pytest

from router.policies import POLICIES, PoolSnapshot, ReplicaLoad


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


def test_p2c_never_picks_the_most_loaded_of_three() -> None:
    picked = Counter(
        POLICIES["p2c"](snapshot(1.0, 2.0, 3.0, num_routers=16), random.Random(seed)).replica_id
        for seed in range(200)
    )
    assert set(picked) == {"r0", "r1"}
    assert picked["r0"] > picked["r1"]


def test_random_picks_every_replica() -> None:
    rng = random.Random(0)
    picked = {POLICIES["random"](snapshot(5.0, 0.0, 9.0), rng).replica_id for _ in range(100)}
    assert picked == {"r0", "r1", "r2"}


@pytest.mark.parametrize("policy", POLICIES)
def test_every_plan_has_a_reason(policy: str) -> None:
    assert POLICIES[policy](snapshot(1.0, 2.0), random.Random(0)).reason
