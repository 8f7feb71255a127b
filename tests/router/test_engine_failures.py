"""Which faults and ends of engines are counted, and what `/health` says of them."""

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from fake_replicas import join, new_replica
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.testclient import TestClient

from engine.exit_cause import EngineExit
from kvtransfer.phase import Phase
from router.engine_failures import EngineFailures
from router.health import PATH, Health
from router.pairs import Pair, Pairs
from router.policies import POLICIES
from router.pool import Pool, Replica

KILLED = EngineExit(cause="SIGKILL", text="the engine was ended by SIGKILL")


def nothing(*_: Any) -> None:
    pass


def pool(name: Phase = "decode") -> Pool:
    return Pool(name, POLICIES["least_work"])


class Ends:
    """The ends that one router has seen, and its metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.ends = EngineFailures(self.registry)

    def count(self, cause: str) -> float:
        labels = {"pool": "decode", "cause": cause}
        return self.registry.get_sample_value("pdserve_engine_ends_total", labels) or 0.0

    def faults(self) -> dict[str, float]:
        """By name, those that were seen."""
        metric = next(each for each in self.registry.collect() if each.name == "pdserve_faults")
        return {
            sample.labels["fault"]: sample.value
            for sample in metric.samples
            if sample.name == "pdserve_faults_total"
        }


def leaves(replica: Replica, because: str) -> None:
    replica.load = msgspec.structs.replace(replica.load, leaves_because=because)


def said(replica: Replica) -> None:
    replica.engine_ended(KILLED)


def silent(replica: Replica) -> None:
    replica.end_if_silent(now_s=replica.heard_s + 11, timeout_s=10)


def node_died(replica: Replica) -> None:
    replica.is_node_dead = True


@pytest.mark.parametrize(
    ("what", "fault", "text"),
    [
        pytest.param(nothing, "connection_lost", "connection lost: cut", id="lost"),
        pytest.param(silent, "replica_silent", "replica silent: cut", id="silent"),
        pytest.param(
            lambda replica: leaves(replica, "stalled"),
            "engine_stalled",
            "engine stalled: cut",
            id="stalled",
        ),
        pytest.param(said, "engine_ended", f"engine ended: {KILLED.text}", id="it-said-how"),
        pytest.param(node_died, "node_gone", "node gone: cut", id="node-gone"),
    ],
)
def test_a_fault_is_counted_by_its_name(what: Any, fault: str, text: str) -> None:
    seen = Ends()
    replica = join(pool(), "a", block_size=16)
    what(replica)
    replica.replica_gone("cut")
    seen.ends.observe(replica)
    assert seen.faults() == {fault: 1}
    assert seen.ends.last_fault is not None
    assert seen.ends.last_fault.text == f"decode replica a: {text}"
    assert seen.count("SIGKILL") == (fault == "engine_ended")
    assert (seen.ends.last is not None) == (fault == "engine_ended")


def test_who_could_not_join_and_is_tried_again_is_not_counted() -> None:
    seen = Ends()
    replica = new_replica(pool(), "a")
    replica.replica_gone("it could not join")
    seen.ends.observe(replica)
    assert seen.faults() == {}
    said(replica)
    seen.ends.observe(replica)
    assert seen.count("SIGKILL") == 1
    assert seen.faults() == {"engine_ended": 1}


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(lambda replica: leaves(replica, "drained"), id="drained"),
        pytest.param(lambda replica: replica.set_listed(False), id="stopped-by-serve"),
    ],
)
def test_who_leaves_in_an_orderly_way_is_not_counted(what: Any) -> None:
    seen = Ends()
    replica = join(pool(), "a", block_size=16)
    what(replica)
    replica.replica_gone("bye")
    seen.ends.observe(replica)
    assert seen.ends.last is None
    assert seen.faults() == {}


@pytest.fixture
def pools() -> tuple[Pool, Pool]:
    return pool("prefill"), pool("decode")


def ask(
    pools: tuple[Pool, ...],
    ends: EngineFailures,
    *,
    errored: bool = False,
    pairs: Pairs | None = None,
) -> tuple[int, dict[str, Any]]:
    async def starting() -> Mapping[str, str]:
        return {"decode": "no memory"}

    health = Health(pools, ends, starting, is_served=lambda: not errored, pairs=pairs or Pairs())
    app = Starlette(routes=[health.route()])
    with TestClient(app) as client:
        answer = client.get(PATH)
        return answer.status_code, answer.json()


def test_health_of_a_whole_cluster(pools: tuple[Pool, Pool]) -> None:
    for each in pools:
        join(each, each.name, block_size=16)
    status, body = ask(pools, Ends().ends)
    assert (status, body) == (200, {"status": "ok", "replicas": {"prefill": 1, "decode": 1}})
    assert ask(pools, Ends().ends, errored=True)[0] == 503


def test_health_says_what_is_missing_and_why(pools: tuple[Pool, Pool]) -> None:
    join(pools[0], "p", block_size=16)
    ends = Ends().ends
    ends.add("decode", "d", KILLED)
    status, body = ask(pools, ends)
    assert status == 503
    assert body["replicas"] == {"prefill": 1, "decode": 0}
    assert body["starting"] == {"decode": "no memory"}
    assert body["last_engine_end"]["cause"] == "SIGKILL"
    assert body["last_engine_end"]["message"] == f"decode replica d: {KILLED.text}"
    assert body["last_fault"]["fault"] == "engine_ended"


def test_health_names_pairs_that_do_not_work(pools: tuple[Pool, Pool]) -> None:
    for each in pools:
        join(each, each.name, block_size=16)
    pairs = Pairs()
    pairs.trying(Pair(prefill="p0", decode="d"))
    assert "unready_pairs" not in ask(pools, Ends().ends, pairs=pairs)[1], "it may well work"
    pairs.failed(Pair(prefill="p1", decode="d"), "no route to host", now_s=0.0)
    status, body = ask(pools, Ends().ends, pairs=pairs)
    assert status == 200
    assert body["unready_pairs"] == [
        {"prefill": "p1", "decode": "d", "problem": "no route to host"}
    ]
