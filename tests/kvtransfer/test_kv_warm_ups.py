"""Warm-ups of pairs: one for all who ask, whose end a step tells, and who is called how often."""

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from nixl_workers import HOST, nixl_workers

from kvtransfer.peers import KVPeer, Peers
from kvtransfer.stats import PairStats, WarmedWorker, warmed_workers

PEER = KVPeer(engine_id="prefill", host="127.0.0.1", port=1, tp_size=2)
OTHER = KVPeer(engine_id="other", host="127.0.0.1", port=2, tp_size=2)

Answer = tuple[int, bool, str | None]
BUSY: list[Answer] = [(0, False, None), (1, False, None)]
DONE: list[Answer] = [(0, True, None), (1, True, None)]


@dataclass
class FakeCore:
    """An engine core with two workers, whose answers are given beforehand."""

    answers: Iterator[list[Answer]]
    called: list[str] = field(default_factory=list)
    was_called: asyncio.Event = field(default_factory=asyncio.Event)

    async def collective_rpc_async(self, method: str, args: tuple[Any, ...]) -> list[Answer]:
        assert method == "warm_up_kv_peer"
        self.called.append(args[0])
        self.was_called.set()
        return next(self.answers)


def step_stats(*workers: WarmedWorker, engine_id: str = "prefill") -> dict[str, Any]:
    """As a step hands them over: of each of the workers its own, merged."""
    merged = PairStats()
    for worker in workers:
        stats = PairStats()
        stats.record_warmed(engine_id, worker)
        merged = merged.aggregate(stats)
    data: dict[str, Any] = merged.to_dict()
    return data


def worker(rank: int, problem: str | None = None) -> WarmedWorker:
    return WarmedWorker(rank=rank, problem=problem)


async def ask(peers: Peers, core: FakeCore, num_routers: int = 1) -> list[asyncio.Task[str | None]]:
    """So many routers ask; returns when the engine was called."""
    tasks = [asyncio.create_task(peers.warm_up(PEER)) for _ in range(num_routers)]
    await core.was_called.wait()
    for _ in range(5):
        await asyncio.sleep(0)
    return tasks


async def test_routers_share_one_call_and_a_steps_stats_tell_its_end() -> None:
    core = FakeCore(iter([BUSY]))
    peers = Peers(core, is_idle=lambda: False)
    tasks = await ask(peers, core, num_routers=3)
    for stats in (None, step_stats(), step_stats(worker(0)), step_stats(worker(0))):
        peers.stepped(stats)
        await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)
    peers.stepped(step_stats(worker(1)))
    assert await asyncio.gather(*tasks) == [None] * 3
    assert core.called == ["prefill"]


@pytest.mark.parametrize(
    ("first", "later"),
    [
        pytest.param(DONE, [], id="both when they are called"),
        pytest.param([(0, False, None), (1, True, None)], [worker(0)], id="one in a step"),
        pytest.param(BUSY, [worker(1), worker(0)], id="both in one step"),
    ],
)
async def test_every_worker_must_be_done(first: list[Answer], later: list[WarmedWorker]) -> None:
    core = FakeCore(iter([first]))
    peers = Peers(core, is_idle=lambda: False)
    (task,) = await ask(peers, core)
    peers.stepped(step_stats(*later))
    assert await task is None
    assert core.called == ["prefill"]


@pytest.mark.parametrize(
    ("first", "later"),
    [
        pytest.param([(0, True, None), (1, True, "no way")], [], id="when it is called"),
        pytest.param(BUSY, [worker(0), worker(1, "no way")], id="in a step"),
    ],
)
async def test_what_keeps_one_worker_from_it_is_said(
    first: list[Answer], later: list[WarmedWorker]
) -> None:
    core = FakeCore(iter([first, DONE]))
    peers = Peers(core, is_idle=lambda: False)
    (task,) = await ask(peers, core)
    peers.stepped(step_stats(*later))
    assert await task == "no way"
    # Whoever asks again has it tried again.
    assert await peers.warm_up(PEER) is None


async def test_an_engine_without_steps_is_asked_again() -> None:
    core = FakeCore(iter([BUSY, [(0, True, None), (1, False, None)], DONE]))
    peers = Peers(core)
    assert await peers.warm_up(PEER) is None
    assert len(core.called) == 3


async def test_an_engine_that_is_named_with_two_addresses_is_one() -> None:
    """The workers know it by its id, whichever address they were told first."""
    core = FakeCore(iter([BUSY, DONE]))
    peers = Peers(core, is_idle=lambda: False)
    (first,) = await ask(peers, core)
    second = asyncio.create_task(peers.warm_up(replace(PEER, port=9)))
    await asyncio.sleep(0)
    peers.stepped(step_stats(worker(0), worker(1)))
    assert (await first, await second) == (None, None)
    assert core.called == ["prefill"]
    assert await peers.warm_up(replace(PEER, port=9)) is None
    assert len(core.called) == 2


async def test_pairs_are_warmed_up_beside_each_other() -> None:
    core = FakeCore(iter([BUSY, DONE]))
    peers = Peers(core, is_idle=lambda: False)
    (task,) = await ask(peers, core)
    assert await peers.warm_up(OTHER) is None
    assert not task.done()
    peers.stepped(step_stats(worker(0), worker(1)))
    assert await task is None


async def test_one_that_does_not_end_is_given_up() -> None:
    core = FakeCore(iter([BUSY, DONE]))
    peers = Peers(core, is_idle=lambda: False, timeout_s=0.01)
    assert await peers.warm_up(PEER) == "the KV of engine prefill was not ready after 0.01 s"
    peers.stepped(step_stats(worker(0), worker(1)))
    assert await peers.warm_up(PEER) is None


async def test_a_router_that_leaves_takes_nothing_from_the_others() -> None:
    core = FakeCore(iter([BUSY]))
    peers = Peers(core, is_idle=lambda: False)
    leaves, stays = await ask(peers, core, num_routers=2)
    leaves.cancel()
    peers.stepped(step_stats(worker(0), worker(1)))
    assert await stays is None


@pytest.mark.parametrize("is_there", [True, False])
def test_a_worker_tells_the_end_of_a_warm_up_in_its_steps(
    monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    with nixl_workers(monkeypatch, bytes_per_s=1e9, read_timeout_s=5) as workers:
        decode = workers.decode
        decode.forget("prefill")
        if not is_there:
            workers.channel.stop()
        assert decode.warm_up("prefill", HOST, workers.channel.port, 1) == (False, None)
        give_up_s = time.monotonic() + 30
        while not (told := warmed_workers(decode.xfer_stats.data)):
            assert time.monotonic() < give_up_s
            workers.step(0.0)
        ((engine_id, (one,)),) = told
        assert (engine_id, one.rank, one.problem is None) == ("prefill", 0, is_there)
        # It is told once.
        decode.xfer_stats.reset()
        workers.step(0.0)
        assert warmed_workers(decode.xfer_stats.data) == ()
