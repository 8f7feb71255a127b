"""What does not agree between a router, its ledgers, the replicas and their engines is named."""

import asyncio
import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
from core_clusters import Cluster
from fake_replicas import FakeEnd, add, decoded, prefilled, request, step
from starlette.applications import Starlette
from starlette.testclient import TestClient

from engine.wire import Holdings, Kind
from router.audit import RouterHoldings, audit
from router.auditor import PATH, Auditor
from router.pool import Replica

ONE = frozenset({"r"})
RUNNING = RouterHoldings(
    front_end=ONE,
    requests=ONE,
    placed={"d0": frozenset({"r~2"})},
    ledger={"p0": frozenset(), "d0": frozenset({"r~2"})},
    prefilling={"d0": frozenset({"r~2"})},
    pending_first_tokens=ONE,
    suspects=ONE,
    num_inflight=1,
)
EMPTY = RouterHoldings(
    front_end=frozenset(),
    requests=frozenset(),
    placed={},
    ledger={"p0": frozenset(), "d0": frozenset()},
    prefilling={},
    pending_first_tokens=frozenset(),
    suspects=frozenset(),
    num_inflight=0,
)
HAS_ONE = Holdings(["r~2"], 1, 1.0, 1, 0, 0.1)
HAS_NONE = Holdings([], 0, 0.0, 0, 0, 0.0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({}, [], id="all-agree"),
        pytest.param(
            {"requests": frozenset(), "num_inflight": 0, "pending_first_tokens": frozenset(),
             "suspects": frozenset()},
            ["the front end waits for requests that nobody has: r"],
            id="a-client-would-wait-for-ever",
        ),
        pytest.param(
            {"front_end": frozenset()}, ["nobody waits for requests: r"], id="left-behind"
        ),
        pytest.param(
            {"ledger": {"d0": frozenset({"r~2", "x"})}},
            ["the ledger of d0 has ended requests: x"],
            id="ledger-keeps",
        ),
        pytest.param(
            {"ledger": {"d0": frozenset()}}, ["the ledger of d0 lacks requests: r~2"],
            id="ledger-lost",
        ),
        pytest.param(
            {"prefilling": {"d0": frozenset({"x"})}},
            ["d0 is counted as prefilling: x"],
            id="prefilling",
        ),
        pytest.param(
            {"pending_first_tokens": frozenset({"x"})},
            ["ended requests count as without a token: x"],
            id="pending-first-tokens",
        ),
        pytest.param(
            {"suspects": frozenset({"x"})}, ["ended requests are in quarantine: x"], id="suspects"
        ),
        pytest.param(
            {"num_inflight": 2}, ["pdserve_inflight says 2 requests, not 1"], id="gauge"
        ),
        pytest.param(
            {"pending_first_tokens": frozenset("abcdefg")},
            ["ended requests count as without a token: a, b, c, d, e and 2 more"],
            id="many-are-counted",
        ),
    ],
)  # fmt: skip
def test_what_a_router_has_of_one_request(changes: dict[str, Any], expected: list[str]) -> None:
    holdings = dataclasses.replace(RUNNING, **changes)
    assert list(audit(holdings, holdings, {}).disagreements) == expected


@pytest.mark.parametrize(
    ("before", "after", "answer", "expected"),
    [
        pytest.param(RUNNING, RUNNING, HAS_ONE, [], id="running"),
        pytest.param(EMPTY, EMPTY, HAS_NONE, [], id="idle"),
        pytest.param(EMPTY, RUNNING, HAS_NONE, [], id="sent-since"),
        pytest.param(RUNNING, EMPTY, HAS_ONE, [], id="ended-since"),
        pytest.param(
            EMPTY, EMPTY, HAS_ONE, ["d0 runs requests that this router has ended: r~2"],
            id="runs-for-nobody",
        ),
        pytest.param(RUNNING, RUNNING, HAS_NONE, ["d0 does not have requests: r~2"], id="lost"),
        pytest.param(EMPTY, EMPTY, None, ["d0 does not answer"], id="silent"),
        pytest.param(
            EMPTY, EMPTY, Holdings([], 0, 2.5, 0, 0, 0.0),
            ["d0 has no request and counts 2.5 s of work"], id="work",
        ),
        pytest.param(
            EMPTY, EMPTY, Holdings([], 0, 0.0, 3, 0, 0.2), ["d0 has no request and its engine 3"],
            id="engine",
        ),
        pytest.param(
            EMPTY, EMPTY, Holdings([], 0, 0.0, 0, 0, 0.25),
            ["d0 has no request and 25.00% of its KV in use"], id="blocks",
        ),
        pytest.param(
            EMPTY, EMPTY, Holdings([], 0, 0.0, 0, 1, 0.25), [], id="kept-for-a-decode-replica"
        ),
        pytest.param(
            EMPTY, EMPTY, Holdings([], 1, 2.5, 1, 0, 0.25), [], id="another-routers-request"
        ),
    ],
)  # fmt: skip
def test_what_a_replica_has(
    before: RouterHoldings, after: RouterHoldings, answer: Holdings | None, expected: list[str]
) -> None:
    assert list(audit(before, after, {"d0": answer}).disagreements) == expected


@dataclass
class AnsweringEnd(FakeEnd):
    """Answers for its replica, which has what it says."""

    replica: Replica | None = None
    holdings: Holdings = HAS_NONE

    def send(self, kind: Kind, message: object) -> None:
        super().send(kind, message)
        if kind is Kind.ASK_HOLDINGS:
            assert self.replica is not None
            asyncio.get_running_loop().call_soon(self.replica.holds, self.holdings)


def answer(replica: Replica, holdings: Holdings) -> None:
    replica.end = AnsweringEnd(replica=replica, holdings=holdings)  # type: ignore[assignment]


async def test_replicas_are_asked_while_requests_run() -> None:
    cluster = Cluster()
    (p,), (d,) = cluster.prefill, cluster.decode
    auditor = Auditor(cluster.core, lambda: cluster.core.lifecycle.requests)
    answer(p, HAS_NONE)
    answer(d, Holdings(["r"], 1, 1.0, 1, 0, 0.1))
    add(cluster.core, request())
    step(p, prefilled())
    first, second = await asyncio.gather(auditor.audit(), auditor.audit())
    assert first is second
    assert first.disagreements == ()
    assert (first.num_requests, first.held["d0"].num_in_engine) == (1, 1)
    step(d, decoded(1, ends=True))
    found = await auditor.audit()
    assert found.disagreements == ("d0 runs requests that this router has ended: r",)


async def test_a_replica_that_goes_meanwhile_does_not_count() -> None:
    cluster = Cluster()
    answer(cluster.prefill[0], HAS_NONE)
    asking = asyncio.create_task(Auditor(cluster.core, tuple).audit())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    cluster.decode[0].replica_gone("killed")
    found = await asking
    assert (found.disagreements, list(found.held)) == ((), ["p0"])


def test_over_http() -> None:
    cluster = Cluster(num=0)
    waiting: list[str] = []
    auditor = Auditor(cluster.core, lambda: waiting)
    app = Starlette(routes=[auditor.route()])
    with TestClient(app) as client:
        answer = client.get(PATH)
        assert (answer.status_code, answer.json()["disagreements"]) == (200, [])
        waiting.append("r")
        answer = client.get(PATH)
        assert answer.status_code == 503
        assert answer.json()["disagreements"] == [
            "the front end waits for requests that nobody has: r"
        ]
