"""Who joins, who is given up and what becomes of pairs, over real connections to fake replicas."""

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import pytest
from fake_replicas import request
from object_graph import reachable
from prometheus_client import CollectorRegistry

from engine.channel import RouterEnd, listen
from engine.exit_cause import EngineExit
from engine.wire import (
    AddRequest,
    Holdings,
    Kind,
    LoadReport,
    ReplicaFacts,
    StepOutputs,
    Warmed,
)
from kvtransfer.peers import KVPeer
from router import membership, pairs, warm_ups
from router.core_client import ClusterCoreClient
from router.engine_ends import EngineEnds
from router.faults import Fault
from router.membership import Membership
from router.metrics import RouterMetrics
from router.pairs import Pair
from router.policies import POLICIES
from router.recovery import RecoveryLimits
from router.serve_list import ListedReplica
from router.traffic import TrafficMeter

LIMITS = RecoveryLimits(max_moves=3, max_wait_s=120.0, stall_timeout_s=10.0)
KILLED = EngineExit(cause="SIGKILL", text="the engine was ended by SIGKILL")
NO_ROUTE = "no route to host"


@dataclass(eq=False)
class FakeReplica:
    """Lets routers in. Its engine is whatever the test says."""

    replica_id: str
    node_id: str = "n0"
    problems: dict[str, str] = field(default_factory=dict)
    """By prefill engine, what keeps this one from reading there."""
    holds_back: set[str] = field(default_factory=set)
    """Prefill engines that are not answered about."""
    routers: list[RouterEnd] = field(default_factory=list)
    num_connections: int = 0
    asked: list[str] = field(default_factory=list)
    """Prefill engines that it was to be made ready for."""
    forgotten: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    server: asyncio.AbstractServer | None = None
    port: int = 0

    async def open(self) -> None:
        self.server, self.port = await listen("127.0.0.1", "secret", self)

    def close(self) -> None:
        """As if its process were gone: nobody is let in any more."""
        assert self.server is not None
        self.server.close()
        self.cut("gone")

    def cut(self, reason: str = "cut") -> None:
        """Its connections break."""
        for router in list(self.routers):
            router.close(reason)

    def end(self) -> None:
        """Its engine has ended, which it says."""
        assert self.server is not None
        self.server.close()
        for router in list(self.routers):
            router.close_after(Kind.ENDED, KILLED, reason=KILLED.text)

    def report(self, load: LoadReport) -> None:
        for router in self.routers:
            router.send(Kind.STEP, StepOutputs([], load))

    def warmed(self, prefill: str, problem: str | None) -> None:
        for router in self.routers:
            router.send(Kind.WARMED, Warmed(prefill, problem))

    def listed(self) -> ListedReplica:
        return ListedReplica(
            replica_id=self.replica_id, address=("127.0.0.1", self.port), node_id=self.node_id
        )

    # engine.channel.RouterRequests

    def facts(self) -> ReplicaFacts:
        return ReplicaFacts(
            engine_id=self.replica_id,
            kv=KVPeer(engine_id=self.replica_id, host="h", port=1, tp_size=1),
            max_model_len=100_000,
            block_size=16,
            num_kv_blocks=10_000,
            max_num_seqs=64,
        )

    def router_joined(self, router: RouterEnd) -> None:
        self.num_connections += 1
        self.routers.append(router)

    def warm_up(self, router: RouterEnd, peer: KVPeer) -> None:
        self.asked.append(peer.engine_id)
        if peer.engine_id not in self.holds_back:
            problem = self.problems.get(peer.engine_id, self.problems.get("*"))
            router.send(Kind.WARMED, Warmed(peer.engine_id, problem))

    def router_gone(self, router: RouterEnd) -> None:
        self.routers.remove(router)

    def add(self, router: RouterEnd, add: AddRequest) -> None:
        self.added.append(add.request.request_id)

    def abort(self, router: RouterEnd, request_ids: list[str]) -> None:
        pass

    def clear(self, router: RouterEnd, request_ids: list[str]) -> None:
        pass

    def holdings(self, router: RouterEnd) -> Holdings:
        return Holdings([], 0, 0.0, 0, 0, 0.0)

    def release(self, router: RouterEnd, request_ids: list[str]) -> None:
        pass

    def forget(self, engine_ids: list[str]) -> None:
        self.forgotten += engine_ids


class Cluster:
    """A core client whose membership follows a list of the test's."""

    def __init__(self, *, stall_timeout_s: float = 60.0) -> None:
        self.registry = CollectorRegistry()
        traffic = TrafficMeter(ttft_s=1.0, itl_s=1.0)
        metrics = RouterMetrics(self.registry, traffic)
        self.core = ClusterCoreClient(POLICIES["round_robin"], metrics, LIMITS, traffic=traffic)
        self.ends = EngineEnds(self.registry)
        self.dead: set[str] = set()
        self.asked_in: list[threading.Thread] = []
        self.num_unanswered = 0
        self.membership = Membership(
            (self.core.prefill, self.core.decode),
            self.core.pairs,
            router_id="router",
            secret="secret",
            stall_timeout_s=stall_timeout_s,
            engine_ends=self.ends,
            dead_nodes=self.dead_nodes,
        )
        self.replicas: dict[str, FakeReplica] = {}

    def dead_nodes(self, node_ids: Collection[str]) -> Collection[str]:
        self.asked_in.append(threading.current_thread())
        if len(self.asked_in) <= self.num_unanswered:
            raise OSError("Ray does not answer")
        return self.dead & set(node_ids)

    async def open(self, *replicas: FakeReplica) -> None:
        for replica in replicas:
            await replica.open()
            self.replicas[replica.replica_id] = replica

    def list_(self, *replica_ids: str) -> None:
        """Serve lists these and no others; prefill's begin with a p."""
        for pool, first in (("prefill", "p"), ("decode", "d")):
            listed = [self.replicas[key].listed() for key in replica_ids if key[0] == first]
            self.membership.listed(pool, {each.replica_id: each for each in listed})

    async def start(self, *replicas: FakeReplica) -> None:
        """All of these are there and have joined."""
        await self.open(*replicas)
        self.list_(*self.replicas)
        await until(lambda: self.joined() == set(self.replicas))

    def joined(self) -> set[str]:
        return {each.replica_id for pool in (self.core.prefill, self.core.decode) for each in pool}

    def faults(self) -> dict[str, float]:
        return {
            sample.labels["fault"]: sample.value
            for metric in self.registry.collect()
            for sample in metric.samples
            if sample.name == "pdserve_faults_total"
        }

    def check(self) -> None:
        """Ledgers and pools agree."""
        for pool in (self.core.prefill, self.core.decode):
            opened = {each.replica_id for each in pool if not each.is_leaving}
            assert pool.ledger.open_ids == opened


async def until(condition: Callable[[], bool], within_s: float = 20.0) -> None:
    """Returns once it holds."""
    async with asyncio.timeout(within_s):
        # What is waited for is many parties' doing, so there is no one event of it.
        for _ in iter(condition, True):
            await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (
        (membership, "RECONNECT_S"),
        (membership, "WATCH_S"),
        (membership, "ASK_S"),
        (pairs, "FIRST_RETRY_S"),
        (warm_ups, "PATIENCE_S"),
        (pairs, "PATIENCE_S"),
    ):
        monkeypatch.setattr(module, name, 0.02)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    made = Cluster()
    yield made
    made.check()
    await stop(made)


async def stop(cluster: Cluster) -> None:
    """Ends everything and waits for it, so that no socket outlives the test."""
    cluster.membership.close()
    cluster.core.shutdown()
    for replica in cluster.replicas.values():
        replica.close()
    here = asyncio.current_task()
    others = [task for task in asyncio.all_tasks() if task is not here]
    await asyncio.gather(*others, return_exceptions=True)
    await until(lambda: not any(each.routers for each in cluster.replicas.values()))
    for _ in range(5):
        # One side closes, the other sees it: connections that were never let in too.
        await asyncio.sleep(0)


async def test_a_replica_joins_when_its_pairs_are_ready(cluster: Cluster) -> None:
    d = FakeReplica("d0", holds_back={"p0"})
    await cluster.start(d)
    await cluster.open(FakeReplica("p0"))
    cluster.list_("d0", "p0")
    await until(lambda: d.asked == ["p0"])
    assert cluster.joined() == {"d0"}
    d.warmed("p0", None)
    await until(lambda: cluster.joined() == {"d0", "p0"})
    assert len(cluster.core.pairs) == 0


@pytest.mark.parametrize("what", ["cut", "gone", "unlisted", "ended"])
async def test_who_is_lost_while_it_is_warmed_up_does_not_join(cluster: Cluster, what: str) -> None:
    p, d = FakeReplica("p0"), FakeReplica("d0", holds_back={"p0"})
    await cluster.start(d)
    await cluster.open(p)
    cluster.list_("d0", "p0")
    await until(lambda: d.asked == ["p0"])
    if what == "unlisted":
        cluster.list_("d0")
    else:
        {"cut": p.cut, "gone": p.close, "ended": p.end}[what]()
    await until(lambda: not cluster.membership._warm_ups.joining)
    d.warmed("p0", None)
    await cluster.core.add_request_async(request())
    await until(lambda: d.added == ["r"])
    assert not cluster.core.prefill.is_open
    assert len(cluster.core.pairs) == 0
    if what == "cut":
        # It is connected to again, and may join then.
        d.holds_back.clear()
        await until(lambda: cluster.joined() == {"d0", "p0"})
    else:
        await until(lambda: p.routers == [])


async def test_a_decode_that_cannot_reach_prefill_keeps_only_itself_out(cluster: Cluster) -> None:
    bad = FakeReplica("d0", problems={"*": NO_ROUTE})
    decodes = [bad, *(FakeReplica(f"d{number}") for number in range(1, 4))]
    await cluster.start(*decodes)
    await cluster.start(*(FakeReplica(f"p{number}") for number in range(3)))
    unready = {pair for pair, _ in cluster.core.pairs}
    assert unready == {Pair(prefill=f"p{number}", decode="d0") for number in range(3)}
    assert {cluster.core.pairs.problem(pair) for pair in unready} == {NO_ROUTE}
    bad.problems.clear()
    await until(lambda: len(cluster.core.pairs) == 0)


async def test_a_decode_that_reaches_nobody_joins_for_whole_requests(cluster: Cluster) -> None:
    await cluster.start(FakeReplica("p0"))
    d = FakeReplica("d0", problems={"p0": NO_ROUTE})
    await cluster.start(d)
    await cluster.core.add_request_async(request())
    await until(lambda: d.added == ["r"])


async def test_a_prefill_that_reaches_nobody_joins_once_it_does(cluster: Cluster) -> None:
    d = FakeReplica("d0", problems={"p0": NO_ROUTE})
    await cluster.start(d)
    await cluster.open(FakeReplica("p0"))
    cluster.list_("d0", "p0")
    await until(lambda: len(d.asked) >= 3)
    assert cluster.joined() == {"d0"}
    assert cluster.replicas["p0"].num_connections == 1, "the connection is not what was wrong"
    d.problems.clear()
    await until(lambda: cluster.joined() == {"d0", "p0"})


async def test_a_prefill_that_waits_meets_a_decode_that_joins(cluster: Cluster) -> None:
    await cluster.start(FakeReplica("d0", problems={"p0": NO_ROUTE}))
    await cluster.open(FakeReplica("p0"))
    cluster.list_("d0", "p0")
    await until(lambda: len(cluster.core.pairs) == 1)
    await cluster.start(FakeReplica("d1"))
    assert cluster.core.pairs.barred("p0") == {"d0"}


async def test_a_pair_that_takes_long_does_not_keep_the_others_waiting(cluster: Cluster) -> None:
    slow = FakeReplica("d0", holds_back={"p0"})
    await cluster.start(slow, FakeReplica("d1"))
    await cluster.start(FakeReplica("p0"))
    assert cluster.core.pairs.barred("p0") == {"d0"}
    slow.warmed("p0", None)
    await until(lambda: len(cluster.core.pairs) == 0)


async def test_a_pair_whose_transfers_fail_is_left_and_tried_again(cluster: Cluster) -> None:
    d = FakeReplica("d0")
    await cluster.start(FakeReplica("p0"), d, FakeReplica("d1"))
    d.holds_back.add("p0")
    num_asked = len(d.asked)
    d.warmed("p0", "4 reads in a row have failed")
    await until(lambda: cluster.core.pairs.barred("p0") == {"d0"})
    await until(lambda: len(d.asked) > num_asked)
    assert cluster.core.pairs.barred("p0") == {"d0"}
    d.warmed("p0", None)
    await until(lambda: len(cluster.core.pairs) == 0)


async def test_what_is_said_of_a_stranger_is_not_noted(cluster: Cluster) -> None:
    d = FakeReplica("d0")
    await cluster.start(d)
    d.warmed("p-gone", "4 reads in a row have failed")
    d.report(LoadReport(num_running=7))
    (replica,) = cluster.core.decode
    await until(lambda: replica.load.num_running == 7)
    assert len(cluster.core.pairs) == 0


async def test_a_lost_connection_is_made_again_at_once(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    d = FakeReplica("d0")
    await cluster.start(d)
    (replica,) = cluster.core.decode
    monkeypatch.setattr(membership, "RECONNECT_S", 1000.0)
    replica.joined_s -= 1000
    d.cut()
    await until(lambda: d.num_connections == 2)
    await until(lambda: cluster.joined() == {"d0"})
    assert cluster.faults() == {"connection_lost": 1}


async def test_who_lets_in_and_cuts_off_does_not_keep_the_router_busy(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    d = FakeReplica("d0")
    await cluster.start(d)
    monkeypatch.setattr(membership, "RECONNECT_S", 1000.0)
    d.cut()
    await until(lambda: cluster.joined() == set())
    (connecting,) = cluster.membership._connecting.values()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(connecting), 0.1)
    assert d.num_connections == 1


async def test_an_ended_engine_is_not_connected_to_again(cluster: Cluster) -> None:
    d = FakeReplica("d0")
    await cluster.start(d)
    d.end()
    await until(lambda: cluster.joined() == set())
    assert cluster.membership._connecting == {}
    assert cluster.faults() == {"engine_ended": 1}
    cluster.list_()
    cluster.list_("d0")
    assert cluster.membership._connecting.keys() == {"d0"}, "what Serve lists anew is new"


async def test_a_stalled_engine_gets_nothing_new_and_is_left(cluster: Cluster) -> None:
    d = FakeReplica("d0")
    await cluster.start(d)
    d.report(LoadReport(leaves_because="stalled"))
    await until(lambda: not cluster.core.decode.is_open)
    cluster.check()
    d.cut()
    await until(lambda: cluster.joined() == set())
    assert cluster.membership._connecting == {}
    assert cluster.faults() == {"engine_stalled": 1}


async def test_a_silent_replica_is_ended_and_connected_to_again() -> None:
    cluster = Cluster(stall_timeout_s=0.2)
    d = FakeReplica("d0")
    await cluster.start(d)
    await until(lambda: cluster.faults() == {"replica_silent": 1})
    await until(lambda: d.num_connections >= 2)
    await stop(cluster)


async def test_who_falls_silent_while_it_is_warmed_up_is_tried_anew() -> None:
    cluster = Cluster(stall_timeout_s=0.3)
    p, d = FakeReplica("p0"), FakeReplica("d0", holds_back={"p0"})

    async def speak() -> None:
        while True:
            d.report(LoadReport())
            await asyncio.sleep(0.02)

    speaking = asyncio.create_task(speak())
    await cluster.start(d)
    await cluster.open(p)
    cluster.list_("d0", "p0")
    await until(lambda: p.num_connections >= 2)
    assert cluster.joined() == {"d0"}
    assert cluster.faults() == {}
    speaking.cancel()
    await stop(cluster)


async def test_a_dead_node_takes_all_that_was_on_it_at_once(cluster: Cluster) -> None:
    here = [FakeReplica("p0", "n0"), FakeReplica("d0", "n0")]
    await cluster.start(*here, FakeReplica("d1", "n1"), FakeReplica("d2", "n1"))
    await asyncio.sleep(0)
    assert cluster.asked_in == [], "no reason yet"
    cluster.dead.add("n1")
    cluster.replicas["d1"].close()
    await until(lambda: cluster.joined() == {"p0", "d0"})
    await until(lambda: cluster.faults() == {"node_gone": 2})
    assert cluster.membership._connecting == {}, "neither comes back"
    assert threading.current_thread() not in cluster.asked_in, "asking may block"


async def test_a_node_is_gone_though_serve_has_given_up_its_replica_before(
    cluster: Cluster,
) -> None:
    await cluster.start(FakeReplica("d0", "n0"), FakeReplica("d1", "n1"))
    cluster.replicas["d1"].close()
    await until(lambda: cluster.joined() == {"d0"})
    cluster.list_("d0")
    num_asked = len(cluster.asked_in)
    await until(lambda: len(cluster.asked_in) > num_asked + 1)
    assert cluster.faults() == {}, "it may be one of two"
    assert cluster.ends.last_fault is not None
    assert cluster.ends.last_fault.fault is Fault.CONNECTION_LOST
    cluster.dead.add("n1")
    await until(lambda: cluster.faults() == {"node_gone": 1})
    assert cluster.ends.last_fault.replica_id == "d1"


async def test_who_is_lost_and_whose_node_lives_is_counted_as_lost(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    await cluster.start(FakeReplica("d0", "n0"), FakeReplica("d1", "n1"))
    monkeypatch.setattr(membership, "SUSPECT_S", 0.2)
    cluster.replicas["d1"].close()
    await until(lambda: cluster.faults() == {"connection_lost": 1})
    cluster.dead.add("n1")
    cluster.list_("d0")
    cluster.replicas["d0"].close()
    await until(lambda: cluster.faults() == {"connection_lost": 2})


async def test_who_is_lost_and_says_that_its_engine_has_ended_is_counted_once(
    cluster: Cluster,
) -> None:
    """It is connected to again, and cannot join any more."""
    d = FakeReplica("d0", "n1")
    await cluster.start(d, FakeReplica("p0"))
    d.holds_back.add("p0")
    d.cut()
    await until(lambda: d.num_connections == 2 and bool(d.routers))
    d.end()
    await until(lambda: "engine_ended" in cluster.faults())
    cluster.dead.add("n1")
    await until(lambda: cluster.membership._suspects == {})
    assert cluster.faults() == {"engine_ended": 1}


async def test_who_has_come_back_is_not_lost_with_its_node(cluster: Cluster) -> None:
    """It leaves in an orderly way before its node dies."""
    d = FakeReplica("d0", "n1")
    await cluster.start(d, FakeReplica("d1", "n1"))
    d.cut()
    await until(lambda: d.num_connections == 2 and cluster.joined() == {"d0", "d1"})
    cluster.list_("d1")
    d.close()
    await until(lambda: cluster.joined() == {"d1"})
    cluster.dead.add("n1")
    await until(lambda: cluster.joined() == set())
    await until(lambda: cluster.faults() == {"connection_lost": 1, "node_gone": 1})


async def test_ray_may_fail_to_say_which_nodes_are_dead(cluster: Cluster) -> None:
    await cluster.start(FakeReplica("d0", "n1"))
    cluster.dead.add("n1")
    cluster.num_unanswered = 1
    cluster.replicas["d0"].close()
    await until(lambda: "node_gone" in cluster.faults())


async def test_decode_engines_forget_who_does_not_come_back(cluster: Cluster) -> None:
    d = FakeReplica("d0")
    await cluster.start(d, FakeReplica("p0"), FakeReplica("p1"))
    cluster.replicas["p0"].cut()
    await until(lambda: cluster.replicas["p0"].num_connections == 2)
    await until(lambda: cluster.joined() == {"d0", "p0", "p1"})
    assert d.forgotten == []
    cluster.replicas["p1"].end()
    await until(lambda: d.forgotten == ["p1"])
    cluster.list_("d0", "p0")
    cluster.list_("d0")
    assert cluster.joined() == {"d0", "p0"}, "it may have something to finish"
    cluster.replicas["p0"].close()
    await until(lambda: d.forgotten == ["p1", "p0"])


async def test_a_decode_that_is_listed_again_wakes_who_waits(cluster: Cluster) -> None:
    await cluster.start(d := FakeReplica("d0"))
    cluster.list_()
    assert not cluster.core.decode.is_open
    await cluster.core.add_request_async(request())
    await asyncio.sleep(0)
    assert d.added == []
    cluster.list_("d0")
    await until(lambda: d.added == ["r"])


async def test_nothing_is_kept_of_replicas_that_are_gone(cluster: Cluster) -> None:
    """A hundred come and go, each in one of the ways in which replicas do."""
    await cluster.start(FakeReplica("p-stays"), d := FakeReplica("d-stays"))

    def kept() -> list[Any]:
        roots = (cluster.core, cluster.membership, cluster.ends, cluster.registry)
        return list(reachable(*roots, without=(FakeReplica, Cluster)))

    sizes = []
    for number in range(100):
        if number % 20 == 0:
            gc.collect()
            sizes.append(len(kept()))
        await come_and_go(cluster, d, f"{'pd'[number % 2]}-gone-{number}", how=number // 2 % 4)
    gc.collect()
    names = {each for each in kept() if isinstance(each, str) and "-gone-" in each}
    last = {each.replica_id for each in (cluster.ends.last, cluster.ends.last_fault) if each}
    told = {name for name in names if not any(replica_id in name for replica_id in last)}
    assert not told, "but of the last that ended, and the last fault"
    assert sizes[-1] - sizes[1] <= sizes[1] / 1000


async def come_and_go(cluster: Cluster, d: FakeReplica, replica_id: str, *, how: int) -> None:
    """A replica joins, gets a request, cannot be paired for a while, and leaves."""
    replica = FakeReplica(replica_id)
    await cluster.start(replica)
    await cluster.core.add_request_async(request(replica_id))
    cluster.core.cancel([replica_id])
    if replica_id.startswith("p"):
        d.warmed(replica_id, "no route")
    else:
        replica.warmed("p-stays", "no route")
    await until(lambda: len(cluster.core.pairs) > 0)
    await until(lambda: len(cluster.core.pairs) == 0)
    # At 0 it is listed no more, and ends its connections by itself as it has nothing.
    (lambda: None, replica.close, replica.cut, replica.end)[how]()
    cluster.list_("p-stays", "d-stays")
    replica.close()
    del cluster.replicas[replica_id]
    await until(lambda: cluster.joined() == {"p-stays", "d-stays"} and not replica.routers)
    await until(lambda: not cluster.membership._connecting)
