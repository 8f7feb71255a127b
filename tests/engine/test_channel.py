"""The channel over real sockets: who gets in, what a closed end means, what is bounded."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.serial_utils import MsgpackEncoder

from engine import channel
from engine.channel import ReplicaEnd, RouterEnd, connect, listen
from engine.errors import ChannelClosed
from engine.exit_cause import EngineExit
from engine.wire import (
    AddRequest,
    Hello,
    Holdings,
    Kind,
    LoadReport,
    Rejection,
    ReplicaFacts,
    StepOutputs,
    Taken,
    Warmed,
    pack_frame,
)
from kvtransfer.peers import KVPeer

KV = KVPeer(engine_id="e", host="127.0.0.1", port=1, tp_size=1)
HOLDINGS = Holdings(["r"], 1, 1.0, 1, 0, 0.5)
FACTS = ReplicaFacts(
    engine_id="e", kv=KV, max_model_len=8, block_size=2, num_kv_blocks=4, max_num_seqs=2
)


@dataclass(eq=False)
class FakeReplica:
    """Records what routers send."""

    added: list[AddRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    released: list[str] = field(default_factory=list)
    cleared: list[str] = field(default_factory=list)
    routers: list[RouterEnd] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    def warm_up(self, router: RouterEnd, peer: KVPeer) -> None:
        pass

    def forget(self, engine_ids: list[str]) -> None:
        pass

    def router_joined(self, router: RouterEnd) -> None:
        pass

    def facts(self) -> ReplicaFacts:
        return FACTS

    def add(self, router: RouterEnd, add: AddRequest) -> None:
        self.added.append(add)
        self.routers.append(router)
        self.changed.set()

    def abort(self, router: RouterEnd, request_ids: list[str]) -> None:
        self.aborted += request_ids
        self.changed.set()

    def release(self, router: RouterEnd, request_ids: list[str]) -> None:
        self.released += request_ids
        self.changed.set()

    def clear(self, router: RouterEnd, request_ids: list[str]) -> None:
        self.cleared += request_ids
        self.changed.set()

    def holdings(self, router: RouterEnd) -> Holdings:
        return HOLDINGS

    def router_gone(self, router: RouterEnd) -> None:
        self.gone.set()


@dataclass(eq=False)
class FakeRouter:
    """Records what a replica sends."""

    steps: list[StepOutputs] = field(default_factory=list)
    answers: list[Taken] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    holdings: list[Holdings] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    def step_received(self, step: StepOutputs) -> None:
        self.steps.append(step)
        self.changed.set()

    def warmed(self, warmed: Warmed) -> None:
        pass

    def taken(self, taken: Taken) -> None:
        self.answers.append(taken)
        self.changed.set()

    def rejected(self, rejection: Rejection) -> None:
        self.rejections.append(rejection)
        self.changed.set()

    def holds(self, holdings: Holdings) -> None:
        self.holdings.append(holdings)
        self.changed.set()

    def engine_ended(self, how: EngineExit) -> None:
        self.exit = how

    def replica_gone(self, reason: str) -> None:
        self.gone.set()


def request(request_id: str = "r") -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=[1, 2, 3],
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=3, extra_args={"a": 1}),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


Listen = Callable[[FakeReplica], Awaitable[int]]


@pytest.fixture
async def listening() -> AsyncIterator[Listen]:
    """Listens for a replica whose secret is "s" and returns the port."""
    servers = []

    async def listen_for(replica: FakeReplica) -> int:
        server, port = await listen("127.0.0.1", "s", replica)
        servers.append(server)
        return port

    yield listen_for
    for server in servers:
        server.close()
        await server.wait_closed()


async def let_in(port: int, router: FakeRouter, secret: str = "s") -> ReplicaEnd:
    end, facts = await connect(("127.0.0.1", port), secret=secret, router_id="router", owner=router)
    assert facts == FACTS
    return end


async def test_messages_arrive_on_both_sides(listening: Listen) -> None:
    replica, router = FakeReplica(), FakeRouter()
    end = await let_in(await listening(replica), router)
    end.send(Kind.ADD, AddRequest(request(), 1.5, asks_load=True))
    await asyncio.wait_for(replica.changed.wait(), 5)
    (added,) = replica.added
    assert added.request.prompt_token_ids == [1, 2, 3]
    assert added.request.sampling_params is not None
    assert added.request.sampling_params.extra_args == {"a": 1}
    assert (added.work_s, added.asks_load) == (1.5, True)
    output = EngineCoreOutput("r", [7], kv_transfer_params={"remote_block_ids": [[1]]})
    replica.routers[0].send(Kind.STEP, StepOutputs([output], LoadReport(others_work_s=2.0)))
    await asyncio.wait_for(router.changed.wait(), 5)
    (step,) = router.steps
    assert step.outputs[0].new_token_ids == [7]
    assert step.outputs[0].kv_transfer_params == {"remote_block_ids": [[1]]}
    assert step.load.others_work_s == 2.0
    router.changed.clear()
    replica.routers[0].send(Kind.TAKEN, Taken("r", LoadReport(others_work_s=3.0)))
    await asyncio.wait_for(router.changed.wait(), 5)
    assert router.answers == [Taken("r", LoadReport(others_work_s=3.0))]
    end.send(Kind.CLEAR, ["r"])
    router.changed.clear()
    end.send(Kind.ASK_HOLDINGS, None)
    await asyncio.wait_for(router.changed.wait(), 5)
    assert (router.holdings, replica.cleared) == ([HOLDINGS], ["r"])
    end.close("done")


async def test_wrong_secret_is_not_let_in(listening: Listen) -> None:
    replica = FakeReplica()
    with pytest.raises(ChannelClosed):
        await let_in(await listening(replica), FakeRouter(), secret="other")
    assert not replica.gone.is_set()


@pytest.mark.parametrize(
    "greeting",
    [
        pytest.param(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", id="http"),
        pytest.param(
            pack_frame(Kind.ADD, MsgpackEncoder().encode(AddRequest(request(), 0.0))),
            id="no-greeting",
        ),
        pytest.param(
            pack_frame(Kind.HELLO, MsgpackEncoder().encode(Hello("router", b""))), id="no-proof"
        ),
    ],
)
async def test_strangers_are_cut_off(listening: Listen, greeting: bytes) -> None:
    replica = FakeReplica()
    port = await listening(replica)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(greeting)
    with contextlib.suppress(ConnectionResetError):
        # The challenge, then the end.
        assert len(await asyncio.wait_for(reader.read(-1), 5)) < 200
    assert replica.added == []
    writer.close()


async def test_silent_strangers_are_cut_off(
    listening: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "GREETING_TIMEOUT_S", 0.05)
    port = await listening(FakeReplica())
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.suppress(ConnectionResetError):
        await asyncio.wait_for(reader.read(-1), 5)
    writer.close()


async def test_each_side_learns_of_the_other_ones_end(listening: Listen) -> None:
    replica, router = FakeReplica(), FakeRouter()
    end = await let_in(await listening(replica), router)
    end.close("the router goes")
    await asyncio.wait_for(replica.gone.wait(), 5)
    await asyncio.wait_for(router.gone.wait(), 5)

    replica, router = FakeReplica(), FakeRouter()
    end = await let_in(await listening(replica), router)
    end.send(Kind.ADD, AddRequest(request(), 0.0))
    await asyncio.wait_for(replica.changed.wait(), 5)
    replica.routers[0].close("the replica goes")
    await asyncio.wait_for(router.gone.wait(), 5)
    end.send(Kind.ABORT, ["r"])  # into the void, without an error
    assert not end.is_open


async def test_a_reader_that_does_not_read_is_cut_off(
    listening: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "MAX_PENDING_BYTES", 1_000_000)
    replica, router = FakeReplica(), FakeRouter()
    end = await let_in(await listening(replica), router)
    end.send(Kind.ADD, AddRequest(request(), 0.0))
    await asyncio.wait_for(replica.changed.wait(), 5)
    assert end._transport is not None
    end._transport.pause_reading()
    output = EngineCoreOutput("r", list(range(100_000)))
    for _ in range(200):
        replica.routers[0].send(Kind.STEP, StepOutputs([output], LoadReport()))
        if not replica.routers[0].is_open:
            break
    else:
        pytest.fail("40 MB were buffered for a router that reads nothing")
    await asyncio.wait_for(replica.gone.wait(), 5)
    end.close("done")
