"""The channel over real sockets: who gets in, what a closed end means, what is bounded."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.serial_utils import MsgpackEncoder

from engine import channel
from engine.channel import PURPOSE, ReplicaEnd, RouterEnd, connect, listen
from engine.errors import ChannelClosed
from engine.exit_cause import EngineExit
from engine.wire import (
    PROTOCOL_VERSION,
    AddRequest,
    Holdings,
    Kind,
    LoadReport,
    Rejection,
    ReplicaFacts,
    StepOutputs,
    Taken,
    Transferred,
    Warmed,
    pack_frame,
)
from kvtransfer.greeting import (
    MAX_STRANGERS,
    ClientGreeting,
    Hello,
    ServerGreeting,
    pack_greeting,
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

    end: ReplicaEnd = field(init=False)
    facts: ReplicaFacts = field(init=False)
    steps: list[StepOutputs] = field(default_factory=list)
    answers: list[Taken] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    holdings: list[Holdings] = field(default_factory=list)
    transfers: list[Transferred] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    def welcomed(self, end: ReplicaEnd, facts: ReplicaFacts) -> "FakeRouter":
        self.end, self.facts = end, facts
        return self

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

    def transferred(self, moved: list[Transferred]) -> None:
        self.transfers += moved
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


async def let_in(
    port: int, router: FakeRouter, secret: str = "s", replica_id: str = "e"
) -> ReplicaEnd:
    await connect(
        ("127.0.0.1", port),
        secret=secret,
        router_id="router",
        replica_id=replica_id,
        welcomed=router.welcomed,
    )
    assert router.facts == FACTS
    return router.end


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
    router.changed.clear()
    replica.routers[0].send(Kind.TRANSFERRED, [Transferred("p", 2, 30, 0.5)])
    await asyncio.wait_for(router.changed.wait(), 5)
    assert router.transfers == [Transferred("p", 2, 30, 0.5)]
    end.send(Kind.CLEAR, ["r"])
    router.changed.clear()
    end.send(Kind.ASK_HOLDINGS, None)
    await asyncio.wait_for(router.changed.wait(), 5)
    assert (router.holdings, replica.cleared) == ([HOLDINGS], ["r"])
    end.close("done")


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        pytest.param({"secret": "other"}, "does not know this application's secret", id="secret"),
        pytest.param({"replica_id": "f"}, "this is e, not f", id="another-replica"),
    ],
)
async def test_who_is_not_let_in_learns_why(
    listening: Listen, how: dict[str, str], reason: str
) -> None:
    replica = FakeReplica()
    with pytest.raises(ChannelClosed, match=reason):
        await let_in(await listening(replica), FakeRouter(), **how)
    assert not replica.gone.is_set()


async def test_a_router_speaks_to_no_replica_of_another_version(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    replica = FakeReplica()
    server, port = await listen("127.0.0.1", "s", replica)
    async with server:
        monkeypatch.setattr(channel, "PROTOCOL_VERSION", PROTOCOL_VERSION + 1)
        # A greeting of the replica is made when somebody connects.
        with monkeypatch.context() as older:
            older.setattr(
                channel,
                "ServerGreeting",
                lambda name, **how: ServerGreeting(name, **(how | {"version": PROTOCOL_VERSION})),
            )
            reason = f"protocol {PROTOCOL_VERSION} meets protocol {PROTOCOL_VERSION + 1}"
            with pytest.raises(ChannelClosed, match=reason):
                await let_in(port, FakeRouter())
            while f"the other side refuses: {reason}" not in caplog.text:  # noqa: ASYNC110
                await asyncio.sleep(0)


async def test_a_replica_without_the_secret_is_not_believed() -> None:
    # It listens where the replica was: it must not be told anything, nor heard.
    impostor = FakeReplica()
    server, port = await listen("127.0.0.1", "guessed", impostor)
    router = FakeRouter()
    async with server:
        with pytest.raises(ChannelClosed, match="secret"):
            await let_in(port, router)
    assert router.steps == []


@pytest.mark.parametrize(
    "said",
    [
        pytest.param([b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"], id="http"),
        pytest.param(
            pack_frame(Kind.ADD, MsgpackEncoder().encode(AddRequest(request(), 0.0))),
            id="no-greeting",
        ),
        pytest.param(
            [pack_greeting(Hello(PROTOCOL_VERSION, "router", "e", b"", b""))], id="no-proof"
        ),
    ],
)
async def test_strangers_are_cut_off(listening: Listen, said: list[bytes]) -> None:
    replica = FakeReplica()
    port = await listening(replica)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.writelines(said)
    with contextlib.suppress(ConnectionResetError):
        # The challenge, perhaps a refusal, then the end.
        assert len(await asyncio.wait_for(reader.read(-1), 5)) < 400
    assert replica.added == []
    writer.close()


async def test_a_recorded_greeting_opens_nothing(listening: Listen) -> None:
    replica = FakeReplica()
    port = await listening(replica)
    greeting = ClientGreeting("router", "e", secret="s", purpose=PURPOSE, version=PROTOCOL_VERSION)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    hello = greeting.feed(await reader.read(4096))
    writer.write(hello)
    assert len(await reader.read(4096)) > 0
    writer.close()
    await asyncio.wait_for(replica.gone.wait(), 5)
    replica.gone.clear()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(hello)
    said = await asyncio.wait_for(reader.read(-1), 5)
    assert b"secret" in said
    assert not replica.gone.is_set()
    writer.close()


async def test_strangers_that_say_nothing_keep_no_router_out(listening: Listen) -> None:
    port = await listening(FakeReplica())
    strangers = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3 * MAX_STRANGERS)]
    end = await let_in(port, FakeRouter())
    for reader, _ in strangers[:MAX_STRANGERS]:
        with contextlib.suppress(ConnectionResetError):
            await asyncio.wait_for(reader.read(-1), 5)
    assert end.is_open
    for _, writer in strangers:
        writer.close()
    end.close("done")


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


def big_request(request_id: str, num_bytes: int) -> EngineCoreRequest:
    big = request(request_id)
    big.prompt_embeds = torch.arange(num_bytes // 4, dtype=torch.int32)
    return big


async def test_a_message_of_any_size_arrives_and_holds_nobody_up(listening: Listen) -> None:
    busy, other = FakeReplica(), FakeReplica()
    routers = FakeRouter(), FakeRouter()
    to_busy = await let_in(await listening(busy), routers[0])
    to_other = await let_in(await listening(other), routers[1])
    big = big_request("big", 100 << 20)
    to_busy.send(Kind.ADD, AddRequest(big, 1.0))
    to_busy.send(Kind.ADD, AddRequest(request("after"), 1.0))
    assert to_busy.num_pending > 50 << 20
    to_other.send(Kind.ADD, AddRequest(request("beside"), 1.0))
    await asyncio.wait_for(other.changed.wait(), 30)
    assert busy.added == [], "the small one went past the big one"
    before_s = to_busy.heard_s
    await asyncio.wait_for(to_busy.drained(), 60)
    assert to_busy.is_drained
    async with asyncio.timeout(60):
        while len(busy.added) < 2:
            busy.changed.clear()
            await busy.changed.wait()
    arrived = busy.added[0].request.prompt_embeds
    assert arrived is not None
    assert big.prompt_embeds is not None
    assert torch.equal(arrived, big.prompt_embeds)
    assert busy.added[1].request.request_id == "after"
    assert before_s == to_busy.heard_s, "the replica has said nothing"
    for end in (to_busy, to_other):
        assert end.is_open
        end.close("done")


async def test_a_message_has_any_number_of_parts(listening: Listen) -> None:
    replica, router = FakeReplica(), FakeRouter()
    end = await let_in(await listening(replica), router)
    end.send(Kind.ADD, AddRequest(request(), 0.0))
    await asyncio.wait_for(replica.changed.wait(), 5)
    output = EngineCoreOutput("r", [7], new_prompt_logprobs_tensors=logprobs(200))
    replica.routers[0].send(Kind.STEP, StepOutputs([output] * 500, LoadReport()))
    await asyncio.wait_for(router.changed.wait(), 30)
    (step,) = router.steps
    assert len(step.outputs) == 500
    arrived = step.outputs[-1].new_prompt_logprobs_tensors
    assert arrived is not None
    assert torch.equal(arrived.logprobs, logprobs(200).logprobs)
    end.close("done")


def logprobs(num_tokens: int) -> LogprobsTensors:
    return LogprobsTensors(
        torch.zeros((num_tokens, 2), dtype=torch.int32),
        torch.rand((num_tokens, 2), generator=torch.Generator().manual_seed(7)),
        torch.zeros(num_tokens, dtype=torch.int32),
    )


async def test_parts_of_a_long_message_are_signs_of_life(listening: Listen) -> None:
    replica, router = FakeReplica(), FakeRouter()
    end = await let_in(await listening(replica), router)
    end.send(Kind.ADD, AddRequest(request(), 0.0))
    await asyncio.wait_for(replica.changed.wait(), 5)
    long = pack_frame(Kind.STEP, [bytes(1 << 20)])
    assert replica.routers[0]._transport is not None
    for part in (long[0], long[1][:1000]):
        end.heard_s = 0.0
        replica.routers[0]._transport.write(part)
        while end.heard_s == 0.0:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0)
    assert router.steps == []
    end.close("done")


async def test_what_cannot_be_encoded_is_not_sent_and_ends_nothing(listening: Listen) -> None:
    replica, router = FakeReplica(), FakeRouter()
    end = await let_in(await listening(replica), router)
    for impossible in ([1 << 70], ["\ud800"], [object()]):
        with pytest.raises(Exception, match=r".+"):
            end.send(Kind.ABORT, impossible)
    assert end.num_pending == 0
    end.send(Kind.ABORT, ["r"])
    await asyncio.wait_for(replica.changed.wait(), 5)
    assert replica.aborted == ["r"]
    end.close("done")


async def test_a_reader_that_stops_and_goes_on_loses_nothing(listening: Listen) -> None:
    replica, router = FakeReplica(), FakeRouter()
    end = await let_in(await listening(replica), router)
    end.send(Kind.ADD, AddRequest(request(), 0.0))
    await asyncio.wait_for(replica.changed.wait(), 5)
    (to_router,) = replica.routers
    assert end._transport is not None
    end._transport.pause_reading()
    output = EngineCoreOutput("r", list(range(100_000)))
    for _ in range(300):
        to_router.send(Kind.STEP, StepOutputs([output], LoadReport()))
    assert to_router.num_pending > 50_000_000
    assert not to_router.is_drained
    assert to_router.is_open
    end._transport.resume_reading()
    await asyncio.wait_for(to_router.drained(), 60)
    async with asyncio.timeout(60):
        while len(router.steps) < 300:
            router.changed.clear()
            await router.changed.wait()
    assert router.steps[-1].outputs[0].new_token_ids == list(range(100_000))
    end.close("done")


async def test_a_reader_that_takes_nothing_is_cut_off() -> None:
    replica, router = FakeReplica(), FakeRouter()
    server, port = await listen("127.0.0.1", "s", replica, stall_timeout_s=0.2)
    async with server:
        end = await let_in(port, router)
        end.send(Kind.ADD, AddRequest(request(), 0.0))
        await asyncio.wait_for(replica.changed.wait(), 5)
        (to_router,) = replica.routers
        assert end._transport is not None
        end._transport.pause_reading()
        to_router.send(
            Kind.STEP, StepOutputs([EngineCoreOutput("r", [7] * 40_000_000)], LoadReport())
        )
        await asyncio.wait_for(to_router.drained(), 30)
        await asyncio.wait_for(replica.gone.wait(), 30)
        assert not to_router.is_open
        assert to_router.num_pending == 0
        end.close("done")


async def test_the_last_message_arrives_behind_a_big_one(listening: Listen) -> None:
    replica, router = FakeReplica(), FakeRouter()
    end = await let_in(await listening(replica), router)
    end.send(Kind.ADD, AddRequest(request(), 0.0))
    await asyncio.wait_for(replica.changed.wait(), 5)
    (to_router,) = replica.routers
    output = EngineCoreOutput("r", [7], new_prompt_logprobs_tensors=logprobs(1_000_000))
    to_router.send(Kind.STEP, StepOutputs([output], LoadReport()))
    how = EngineExit(cause="error", text="it has ended")
    to_router.close_after(Kind.ENDED, how, reason="it has ended")
    assert not to_router.is_open
    await asyncio.wait_for(router.gone.wait(), 30)
    assert router.exit == how
    assert len(router.steps) == 1
    await asyncio.wait_for(replica.gone.wait(), 5)
    assert end.closed_because == "the other side closed the connection"
