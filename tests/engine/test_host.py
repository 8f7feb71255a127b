"""The engine host with a real engine: requests through a channel, health, and the end of it all."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator

import psutil
import pytest
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.stats import SchedulerStats

from benchmarks.chaos_processes import suspend
from engine.arguments import engine_args
from engine.channel import ReplicaEnd, RouterEnd, connect
from engine.errors import EngineStalled
from engine.exit_cause import EngineExit
from engine.guardian import MARK_VARIABLE, marked_pids
from engine.host import EngineHost, _unless_ended
from engine.models import resolve_model
from engine.replica import EngineReplica
from engine.steps import StepSample
from engine.wire import (
    AddRequest,
    Holdings,
    Kind,
    Rejection,
    ReplicaFacts,
    StepOutputs,
    Taken,
    Transferred,
    Warmed,
)
from kvtransfer.peers import KVPeer

OPTIONS = {"max_model_len": 256, "kv_cache_memory_bytes": 2**26}

START_AND_WAIT = f"""
import asyncio, os, sys
from engine.models import resolve_model
from engine.guardian import MARK_VARIABLE
from engine.arguments import engine_args
from engine.host import EngineHost, _unless_ended

async def main():
    host = await EngineHost.start(engine_args(resolve_model("demo"), {OPTIONS!r}))
    print("mark", os.environ[MARK_VARIABLE], flush=True)
    await asyncio.Event().wait()

if __name__ == "__main__":
    asyncio.run(main())
"""


class NoHooks:
    """A phase that does nothing but say when the engine has reported."""

    def __init__(self) -> None:
        self.reported = asyncio.Event()

    def output_sent(self, router: RouterEnd, output: EngineCoreOutput) -> None:
        pass

    def output_orphaned(self, output: EngineCoreOutput) -> None:
        pass

    def released(self, request_ids: list[str]) -> None:
        pass

    def router_gone(self, router: RouterEnd) -> None:
        pass

    def num_kept(self) -> int:
        return 0

    def forgotten(self, engine_ids: list[str]) -> None:
        pass

    def stats_seen(self, stats: SchedulerStats) -> None:
        self.reported.set()


class Recorder:
    """A router's side that keeps what comes."""

    def __init__(self) -> None:
        self.outputs: asyncio.Queue[EngineCoreOutput] = asyncio.Queue()
        self.answers: asyncio.Queue[Taken] = asyncio.Queue()
        self.rejections: asyncio.Queue[Rejection] = asyncio.Queue()
        self.holdings: asyncio.Queue[Holdings] = asyncio.Queue()
        self.gone = asyncio.Event()
        self.steps: dict[int, StepSample] = {}
        """Of the engine, by number."""

    def step_received(self, step: StepOutputs) -> None:
        if step.load.step is not None:
            self.steps[step.load.step.number] = step.load.step
        for output in step.outputs:
            self.outputs.put_nowait(output)

    def warmed(self, warmed: Warmed) -> None:
        pass

    def taken(self, taken: Taken) -> None:
        self.answers.put_nowait(taken)

    def rejected(self, rejection: Rejection) -> None:
        self.rejections.put_nowait(rejection)

    def holds(self, holdings: Holdings) -> None:
        self.holdings.put_nowait(holdings)

    def transferred(self, moved: list[Transferred]) -> None:
        pass

    def engine_ended(self, how: EngineExit) -> None:
        self.exit = how

    def replica_gone(self, reason: str) -> None:
        self.gone.set()

    async def answer(self, request_id: str) -> list[int]:
        """The whole answer to one request."""
        tokens: list[int] = []
        while True:
            output = await asyncio.wait_for(self.outputs.get(), 60)
            if output.request_id != request_id:
                continue
            tokens += output.new_token_ids
            if output.finished:
                return tokens


class Running:
    """A replica with a real engine, and two routers connected to it."""

    def __init__(self, replica: EngineReplica, hooks: NoHooks) -> None:
        self.replica = replica
        self.hooks = hooks

    async def idle(self) -> None:
        """Returns once the engine holds no request and no block."""
        async with asyncio.timeout(10):
            while self.replica.num_requests or self.replica.kv_usage_fraction:
                self.hooks.reported.clear()
                await self.hooks.reported.wait()

    async def has_taken(self) -> None:
        """Returns once it holds a request."""
        async with asyncio.timeout(10):
            while not self.replica.num_requests:  # noqa: ASYNC110 - the replica tells nobody
                await asyncio.sleep(0.01)

    async def join(self, name: str) -> tuple[ReplicaEnd, Recorder]:
        assert self.replica.address is not None
        recorder, welcomes = Recorder(), list[tuple[ReplicaEnd, ReplicaFacts]]()

        def welcomed(end: ReplicaEnd, facts: ReplicaFacts) -> Recorder:
            welcomes.append((end, facts))
            return recorder

        await connect(
            self.replica.address, secret="s", router_id=name, replica_id="e", welcomed=welcomed
        )
        ((end, facts),) = welcomes
        assert (facts.engine_id, facts.max_model_len) == ("e", 256)
        return end, recorder


def request(request_id: str, max_tokens: int = 4) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=[5, 6, 7],
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    host = await EngineHost.start(engine_args(resolve_model("demo"), OPTIONS))
    hooks = NoHooks()
    replica = EngineReplica(host, KVPeer(engine_id="e", host="127.0.0.1", port=1, tp_size=1), hooks)
    await replica.open("127.0.0.1", "s")
    yield Running(replica, hooks)
    replica.close("the test is over")
    host.stop()


async def test_life_of_an_engine(running: Running) -> None:
    """One engine start for all of it, because a start takes long: the order is its life."""
    one, first = await running.join("one")
    two, second = await running.join("two")

    # Each router gets the outputs of its own requests, and only those.
    one.send(Kind.ADD, AddRequest(request("a"), 1.0))
    two.send(Kind.ADD, AddRequest(request("b", max_tokens=6), 2.0))
    assert len(await first.answer("a")) == 4
    assert len(await second.answer("b")) == 6
    assert first.outputs.empty()

    # What each step computed is told: a prompt of three tokens, then one token after the other.
    before = max(second.steps)
    two.send(Kind.ADD, AddRequest(request("c", max_tokens=8), 1.0))
    await second.answer("c")
    steps = [second.steps[number] for number in sorted(second.steps) if number > before]
    assert all(step.seconds > 0 for step in steps)
    read = [step for step in steps if step.num_prefill_tokens]
    assert [(step.num_prefill_tokens, step.prefill_attention) for step in read] == [(3, 9)]
    assert [step.num_context_tokens for step in steps if step.num_decodes] == [*range(4, 11)]

    # Who asks is told at once what others have sent there and how far it is with the oldest of
    # that, of which one that leaves from behind says nothing.
    one.send(Kind.ADD, AddRequest(request("twice", max_tokens=200), 100.0))
    await running.has_taken()
    answers = []
    for name in ("behind", "again"):
        two.send(Kind.ADD, AddRequest(request(name, max_tokens=200), 3.0, asks_load=True))
        answers.append(await asyncio.wait_for(second.answers.get(), 10))
        two.send(Kind.ABORT, [name])
    assert [each.request_id for each in answers] == ["behind", "again"]
    assert [each.load.others_work_s for each in answers] == [100.0, 100.0]
    assert answers[1].load.progress_s > answers[0].load.progress_s

    # An id that is running already is refused, and the one that runs is not touched.
    two.send(Kind.ADD, AddRequest(request("twice"), 1.0))
    rejection = await asyncio.wait_for(second.rejections.get(), 10)
    assert rejection.request_id == "twice"

    # A router that goes takes its requests with it.
    assert running.replica.num_requests == 1
    one.close("gone")
    await running.idle()

    # Aborted by its router: the engine is free of it.
    two.send(Kind.ADD, AddRequest(request("long", max_tokens=200), 1.0))
    await asyncio.wait_for(second.outputs.get(), 10)
    two.send(Kind.ABORT, ["long"])
    await running.idle()

    # A stopped engine core is noticed, a continued one is well again.
    await running.replica.host.check(timeout_s=10)
    core = engine_core()
    suspend(core.pid)
    with pytest.raises(EngineStalled):
        await running.replica.host.check(timeout_s=0.2)
    with running.replica.host.held():
        await running.replica.host.check(timeout_s=0.2)  # It may be waiting for its replica.
    core.resume()
    await running.replica.host.check(timeout_s=10)

    # A dead one closes the channel at once and fails the health check. A request that came when it
    # was known to be dead is not refused: its router is to take it elsewhere.
    resources = running.replica.host.core.resources
    resources.engine_dead = True
    two.send(Kind.ADD, AddRequest(request("late"), 1.0))
    await running.has_taken()
    resources.engine_dead = False
    core.kill()
    await asyncio.wait_for(second.gone.wait(), 10)
    assert second.rejections.empty()
    with pytest.raises(EngineDeadError):
        await running.replica.host.check(timeout_s=10)
    assert running.replica.host.is_dead


def engine_core() -> psutil.Process:
    """The engine core of this process's only engine."""
    mark = os.environ[MARK_VARIABLE]
    (core,) = (
        process
        for process in map(psutil.Process, marked_pids(mark))
        if "EngineCore" in process.name() or "EngineCore" in " ".join(process.cmdline())
    )
    return core


def test_nothing_of_an_engine_outlives_its_replica() -> None:
    replica = subprocess.Popen(
        [sys.executable, "-c", START_AND_WAIT], stdout=subprocess.PIPE, text=True
    )
    try:
        assert replica.stdout is not None
        mark = next(line for line in replica.stdout if line.startswith("mark ")).split()[1]
        engine = marked_pids(mark)
        assert engine
        # The hardest case: the engine cannot even notice.
        for pid in engine:
            suspend(pid)
    finally:
        replica.kill()
        replica.wait()
        assert replica.stdout is not None
        replica.stdout.close()
    _, alive = psutil.wait_procs(map(psutil.Process, set(engine) & set(psutil.pids())), 5)
    assert alive == []
    assert marked_pids(mark) == []


def test_an_engine_that_cannot_start_says_why() -> None:
    with pytest.raises(ValueError, match="max_model_len"):
        engine_args(resolve_model("demo"), {"max_model_len": 10**9}).create_engine_config()


class Mute:
    """An engine core's client whose calls are never answered; its outputs end with the engine."""

    async def call(self) -> None:
        await asyncio.Event().wait()

    async def get_output_async(self) -> None:
        raise EngineDeadError


async def test_a_call_to_an_engine_that_ends_does_not_wait_for_ever() -> None:
    core = Mute()
    with pytest.raises(EngineDeadError):
        await asyncio.wait_for(_unless_ended(core, core.call()), 10)
