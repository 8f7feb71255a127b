"""Requests go from a prefill replica only to decode replicas that can read from it."""

import random
from collections.abc import Iterator

import pytest
from fake_replicas import decoded, end_of, join, prefilled, request, step
from prometheus_client import CollectorRegistry

from engine.wire import Kind
from router.core_client import ClusterCoreClient
from router.metrics import RouterMetrics
from router.pairs import Pair
from router.phases import RequestPhase
from router.policies import POLICIES
from router.pool import Replica
from router.recovery import RecoveryLimits
from router.request import KV_PARAMS
from router.settings import Targets
from router.traffic import TrafficMeter

BLOCK = 64
LIMITS = RecoveryLimits(max_moves=1_000_000, max_wait_s=120.0, stall_timeout_s=10.0)


class Cluster:
    """A core client over fake replicas, some of whose pairs do not work."""

    def __init__(self, policy: str = "round_robin", *, num: int = 2, local: bool = False) -> None:
        traffic = TrafficMeter(ttft_s=1.0, itl_s=1.0)
        self.core = ClusterCoreClient(
            POLICIES[policy],
            RouterMetrics(CollectorRegistry(), traffic),
            LIMITS,
            traffic=traffic,
            targets=Targets(local_prefill=local),
        )
        for number in range(num):
            join(self.core.prefill, f"p{number}", block_size=BLOCK)
            join(self.core.decode, f"d{number}", block_size=BLOCK)

    def __getitem__(self, replica_id: str) -> Replica:
        pool = self.core.prefill if replica_id[0] == "p" else self.core.decode
        return pool[replica_id]

    def bar(self, *names: str) -> None:
        for name in names:
            prefill, decode = name.split("-")
            self.core.pairs.failed(Pair(prefill=prefill, decode=decode), "no", now_s=0.0)

    def asked(self) -> dict[str, list[str]]:
        """By replica, the requests that it was asked."""
        every = (*self.core.prefill, *self.core.decode)
        return {
            replica.replica_id: [each.request_id for each in end_of(replica).added()]
            for replica in every
            if end_of(replica).added()
        }

    async def add(self, *request_ids: str, max_tokens: int = 4) -> None:
        for request_id in request_ids:
            await self.core.add_request_async(request(request_id, max_tokens=max_tokens))


async def test_a_handover_goes_to_a_decode_that_can_read_there() -> None:
    cluster = Cluster()
    cluster.bar("p0-d0", "p1-d1")
    await cluster.add("a", "b", "c", "d")
    for replica_id in ("p0", "p1"):
        for each in end_of(cluster[replica_id]).added():
            step(cluster[replica_id], prefilled(request_id=each.request_id))
    assert cluster.asked() == {
        "p0": ["a", "c"],
        "p1": ["b", "d"],
        "d0": ["b", "d"],
        "d1": ["a", "c"],
    }


async def test_a_prefill_from_which_nobody_can_read_gets_no_prompt() -> None:
    cluster = Cluster()
    cluster.bar("p0-d0", "p0-d1")
    await cluster.add("a", "b")
    assert cluster.asked() == {"p1": ["a", "b"]}


async def test_decode_reads_prompts_itself_where_no_pair_is_left() -> None:
    cluster = Cluster(num=1)
    cluster.bar("p0-d0")
    await cluster.add("a")
    await cluster.add("short", max_tokens=1)
    assert cluster.asked() == {"d0": ["a", "short"]}


async def test_a_decode_without_a_pair_still_does_whole_requests() -> None:
    cluster = Cluster()
    cluster.bar("p0-d0", "p1-d0")
    params = {"prompt_logprobs": 1}
    for request_id in ("a", "b"):
        await cluster.core.add_request_async(request(request_id, **params))
    assert cluster.asked() == {"d0": ["a"], "d1": ["b"]}


async def test_a_prompt_whose_readers_are_gone_is_read_again_elsewhere() -> None:
    cluster = Cluster()
    cluster.bar("p0-d0")
    await cluster.add("a")
    cluster["d1"].set_listed(False)
    step(cluster["p0"], prefilled(request_id="a"))
    assert end_of(cluster["p0"]).told(Kind.RELEASE) == ["a"]
    assert cluster.asked() == {"p0": ["a"], "p1": ["a~2"]}
    step(cluster["p1"], prefilled(10, request_id="a~2"))
    assert cluster.asked()["d0"] == ["a~2"]


async def test_a_prompt_whose_pairs_broke_is_computed_by_decode() -> None:
    cluster = Cluster(num=1)
    await cluster.add("a")
    cluster.bar("p0-d0")
    step(cluster["p0"], prefilled(request_id="a"))
    assert end_of(cluster["p0"]).told(Kind.RELEASE) == ["a"]
    (asked,) = end_of(cluster["d0"]).added()
    assert asked.request_id == "a~2"
    assert asked.sampling_params is not None
    assert KV_PARAMS not in (asked.sampling_params.extra_args or {})
    step(cluster["d0"], decoded(11, ends=True, request_id="a~2"))
    assert cluster.core._requests == {}


async def test_a_pair_that_is_healed_is_used_again() -> None:
    cluster = Cluster(num=1)
    cluster.bar("p0-d0")
    cluster.core.pairs.ready(Pair(prefill="p0", decode="d0"), now_s=1.0)
    await cluster.add("a")
    assert cluster.asked() == {"p0": ["a"]}


class Storm:
    """Replicas and pairs come and go, and requests go on. Owns what happens and checks it."""

    def __init__(self, seed: int, policy: str, *, local: bool) -> None:
        self.rng = random.Random(seed)
        self.cluster = Cluster(policy, num=2, local=local)
        self.core = self.cluster.core
        self.num_requests = 0
        self.num_replicas = 10
        self.num_seen: dict[str, int] = {}
        """By replica, the requests that were looked at."""
        self.num_handovers = 0

    @property
    def replicas(self) -> list[Replica]:
        return [*self.core.prefill, *self.core.decode]

    def pairs(self) -> Iterator[Pair]:
        for prefill in self.core.prefill:
            for decode in self.core.decode:
                yield Pair(prefill=prefill.replica_id, decode=decode.replica_id)

    async def happen(self) -> None:
        names = ["add", "add", "prefill", "prefill", "decode", "decode", "join", "leave", "list"]
        names += ["fail", "heal"]
        what = self.rng.choice(names)
        if what == "add":
            await self.cluster.add(f"r{self.num_requests}", max_tokens=self.rng.choice([1, 2, 5]))
            self.num_requests += 1
        elif what in ("prefill", "decode"):
            self.answer(RequestPhase.PREFILLING if what == "prefill" else None)
        elif what == "join" and len(self.replicas) < 8:
            self.join(self.rng.choice("pd"))
        elif self.replicas and what in ("leave", "list"):
            replica = self.rng.choice(self.replicas)
            if what == "leave":
                self.leave(replica)
            else:
                replica.set_listed(replica.is_unlisted)
        elif pairs := list(self.pairs()):
            pair = self.rng.choice(pairs)
            if what == "fail":
                self.core.pairs.failed(pair, "no", 0.0)
            elif what == "heal":
                self.core.pairs.ready(pair, 0.0)

    def join(self, kind: str) -> None:
        """As membership has it: its pairs are barred or ready before it is in the pool."""
        self.num_replicas += 1
        own_id = f"{kind}{self.num_replicas}"
        others = list(self.core.decode if kind == "p" else self.core.prefill)
        for other in others:
            ids = (own_id, other.replica_id) if kind == "p" else (other.replica_id, own_id)
            if self.rng.random() < 0.5:
                self.core.pairs.failed(Pair(prefill=ids[0], decode=ids[1]), "no", 0.0)
        pool = self.core.prefill if kind == "p" else self.core.decode
        join(pool, own_id, block_size=BLOCK)

    def leave(self, replica: Replica) -> None:
        # Silent, so that nobody is taken for having killed it.
        replica.is_silent = True
        replica.replica_gone("gone")
        self.core.pairs.forget(replica.replica_id)

    def answer(self, phase: RequestPhase | None) -> None:
        """One engine does what one request asks of it."""
        states = [s for s in self.core._requests.values() if s.replica is not None]
        states = [s for s in states if (s.phase is RequestPhase.PREFILLING) == (phase is not None)]
        if not states:
            return
        state = self.rng.choice(states)
        assert state.replica is not None
        if phase is not None:
            step(state.replica, prefilled(request_id=state.engine_request_id))
            return
        ends = state.num_output_tokens + 1 >= (state.params.max_tokens or 0)
        step(state.replica, decoded(7, ends=ends, request_id=state.engine_request_id))

    def check(self) -> None:
        for pool in (self.core.prefill, self.core.decode):
            assert pool.ledger.open_ids == {r.replica_id for r in pool if not r.is_leaving}
            for replica in pool:
                mine = [s for s in self.core._requests.values() if s.replica is replica]
                assert pool.ledger.num_sent(replica.replica_id) == len(mine)
                self.check_sent(replica)
        for state in self.core._requests.values():
            if state.phase is RequestPhase.WAITING:
                assert not self.core.decode.is_open, "there was a way"
            else:
                assert state.replica in self.replicas

    def check_sent(self, replica: Replica) -> None:
        """What was sent to it since the last event, no pair having changed since."""
        added = end_of(replica).added()
        for asked in added[self.num_seen.get(replica.replica_id, 0) :]:
            assert asked.sampling_params is not None
            kv = (asked.sampling_params.extra_args or {}).get(KV_PARAMS)
            if kv is None:
                continue
            self.num_handovers += 1
            if replica.pool is self.core.prefill:
                opened = self.core.decode.ledger.open_ids
                assert replica.replica_id not in self.core.pairs.stranded(opened)
                continue
            state = self.core._in_engines[asked.request_id]
            assert state.prefill is not None
            pair = Pair(prefill=state.prefill.replica_id, decode=replica.replica_id)
            assert self.core.pairs.is_ready(pair)
        self.num_seen[replica.replica_id] = len(added)

    def end(self) -> None:
        """Nothing goes wrong any more, and some pair works: everything ends."""
        for replica in self.replicas:
            replica.set_listed(True)
        for kind in "pd":
            self.join(kind)
        for pair in list(self.pairs()):
            self.core.pairs.ready(pair, 0.0)
        for _ in range(10_000):
            if not self.core._requests:
                break
            self.answer(self.rng.choice([RequestPhase.PREFILLING, None]))
            self.check()
        assert self.core._requests == self.core._in_engines == {}
        assert all(r.pool.ledger.num_sent(r.replica_id) == 0 for r in self.replicas)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("policy", sorted(POLICIES))
async def test_whatever_comes_and_goes_requests_go_where_they_can(policy: str, local: bool) -> None:
    num_handovers = 0
    for seed in range(20):
        storm = Storm(seed, policy, local=local)
        for _ in range(300):
            await storm.happen()
            storm.check()
        storm.end()
        num_handovers += storm.num_handovers
    assert num_handovers > 20, "or it has shown nothing"
