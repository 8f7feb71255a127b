"""A replica whose routers read slowly: what waits, and what does not."""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from test_channel import request
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats

from engine.exit_cause import EngineExit
from engine.host import EngineFacts
from engine.replica import EngineReplica
from engine.wire import AddRequest, Kind, StepOutputs
from kvtransfer.peers import KVPeer


class FakeCore:
    def __init__(self) -> None:
        self.steps: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        self.aborted: list[str] = []

    async def get_output_async(self) -> EngineCoreOutputs:
        return await self.steps.get()

    async def add_request_async(self, request: object) -> None:
        pass

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        self.aborted += request_ids


class FakeHost:
    def __init__(self) -> None:
        self.core = FakeCore()
        self.num_holds = 0
        self.is_held = False

    def facts(self) -> EngineFacts:
        return EngineFacts(max_model_len=8, block_size=2, num_kv_blocks=4, max_num_seqs=2)

    def exit(self) -> EngineExit:
        return EngineExit(cause="error", text="?")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        self.num_holds += 1
        self.is_held = True
        yield
        self.is_held = False


class FakeRouterEnd:
    """A router's connection that is behind until the test lets it catch up."""

    def __init__(self, name: str) -> None:
        self.router_id = name
        self.is_open = True
        self.caught_up = asyncio.Event()
        self.caught_up.set()
        self.tokens: list[int] = []
        self.sent = asyncio.Event()

    @property
    def is_drained(self) -> bool:
        return self.caught_up.is_set()

    async def drained(self) -> None:
        await self.caught_up.wait()

    def send(self, kind: Kind, message: object) -> None:
        assert isinstance(message, StepOutputs)
        self.tokens += [token for output in message.outputs for token in output.new_token_ids]
        if message.outputs:
            self.sent.set()

    def close(self, reason: str) -> None:
        self.is_open = False


class NoHooks:
    def output_sent(self, router: Any, output: EngineCoreOutput) -> None:
        pass

    def output_orphaned(self, output: EngineCoreOutput) -> None:
        pass

    def released(self, request_ids: list[str]) -> None:
        pass

    def router_gone(self, router: Any) -> None:
        pass

    def num_kept(self) -> int:
        return 0

    def forgotten(self, engine_ids: list[str]) -> None:
        pass

    def stats_seen(self, stats: SchedulerStats) -> None:
        pass


def step(request_id: str, token: int) -> EngineCoreOutputs:
    return EngineCoreOutputs(outputs=[EngineCoreOutput(request_id, [token])])


async def until_sent(router: FakeRouterEnd) -> None:
    await asyncio.wait_for(router.sent.wait(), 5)
    router.sent.clear()


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_router_that_is_behind_holds_the_engine_until_it_reads_or_ends(
    leaves: bool,
) -> None:
    host: Any = FakeHost()
    kv = KVPeer(engine_id="e", host="127.0.0.1", port=1, tp_size=1)
    replica = EngineReplica(host, kv, NoHooks())
    await replica.open("127.0.0.1", "s")
    slow: Any = FakeRouterEnd("slow")
    other: Any = FakeRouterEnd("other")
    for router in (slow, other):
        replica.router_joined(router)
        replica.add(router, AddRequest(request(router.router_id), 1.0))
    host.core.steps.put_nowait(step("slow", 1))
    await until_sent(slow)
    assert host.num_holds == 0

    slow.caught_up.clear()
    host.core.steps.put_nowait(step("slow", 2))
    await until_sent(slow)
    host.core.steps.put_nowait(step("other", 3))
    # The relay has nothing else to do: it would have sent it by now.
    for _ in range(20):
        await asyncio.sleep(0)
    assert host.is_held
    assert other.tokens == []

    if leaves:
        replica.router_gone(slow)
    slow.caught_up.set()
    await until_sent(other)
    assert not host.is_held
    assert (slow.tokens, other.tokens) == ([1, 2], [3])
    replica.close("done")
