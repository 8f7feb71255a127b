"""Which ends of engines are counted, and what `/health` says of them."""

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from fake_replicas import FakeEnd, join
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.testclient import TestClient

from engine.exit_cause import EngineExit
from router.engine_ends import EngineEnds
from router.health import PATH, Health
from router.policies import POLICIES
from router.pool import Pool, PoolEvents, Replica

KILLED = EngineExit(cause="SIGKILL", text="the engine was ended by SIGKILL")


def nothing(*_: Any) -> None:
    pass


def pool(name: str = "decode") -> Pool:
    events = PoolEvents(
        joined=nothing, stepped=nothing, taken=nothing, rejected=nothing, gone=nothing
    )
    return Pool(name, POLICIES["least_work"], events)


class Ends:
    """The ends that one router has seen, and its metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.ends = EngineEnds(self.registry)

    def count(self, cause: str) -> float | None:
        labels = {"pool": "decode", "cause": cause}
        value: float | None = self.registry.get_sample_value("pdserve_engine_ends_total", labels)
        return value


def leaves(replica: Replica, because: str) -> None:
    replica.load = msgspec.structs.replace(replica.load, leaves_because=because)


def said(replica: Replica) -> None:
    replica.engine_ended(KILLED)


@pytest.mark.parametrize(
    ("what", "cause", "text"),
    [
        pytest.param(said, "SIGKILL", KILLED.text, id="it-said-how"),
        pytest.param(
            lambda replica: leaves(replica, "stalled"),
            "stalled",
            "the engine gave no sign of life: cut",
            id="stalled",
        ),
        pytest.param(nothing, "lost", "the connection to it was lost: cut", id="lost"),
    ],
)
def test_an_end_is_counted_by_cause(what: Any, cause: str, text: str) -> None:
    seen = Ends()
    replica = join(pool(), "a", block_size=16)
    what(replica)
    replica.end.close("cut")  # type: ignore[union-attr]
    seen.ends.observe(replica)
    assert seen.count(cause) == 1
    assert seen.ends.last is not None
    assert seen.ends.last.text == f"decode replica a: {text}"


def test_who_could_not_join_and_is_tried_again_is_not_counted() -> None:
    seen = Ends()
    replica = Replica("a", pool(), on_gone=nothing)
    replica.end = FakeEnd(closed_because="it is tried again")  # type: ignore[assignment]
    seen.ends.observe(replica)
    assert seen.ends.last is None
    said(replica)
    seen.ends.observe(replica)
    assert seen.count("SIGKILL") == 1


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
    replica.end.close("bye")  # type: ignore[union-attr]
    seen.ends.observe(replica)
    assert seen.ends.last is None


@pytest.fixture
def pools() -> tuple[Pool, Pool]:
    return pool("prefill"), pool("decode")


def ask(
    pools: tuple[Pool, ...], ends: EngineEnds, *, errored: bool = False
) -> tuple[int, dict[str, Any]]:
    async def starting() -> Mapping[str, str]:
        return {"decode": "no memory"}

    health = Health(pools, ends, starting)
    health.is_served = lambda: not errored
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
