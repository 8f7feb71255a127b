"""The socket that carries an engine's steps: who is let in, and what becomes of what it says."""

import asyncio
import os
import pickle
import socket
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config.utils import replace
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.outputs import LogprobsTensors

from engine import outlet
from engine.arguments import engine_args
from engine.errors import ChannelClosed, EngineInternalsChanged, ProtocolError
from engine.models import resolve_model
from engine.outlet import Inlet, Outlet
from engine.wire import Kind, pack_frame
from kvtransfer.credentials import Credentials, credentials_of, give_credentials


class Scheduler:
    """Stands where vLLM's does; every step puts out what it is given as the step's computation."""

    def __init__(self, config: Any) -> None:
        self.vllm_config = config

    def update_from_output(self, scheduled: Any, computed: Any) -> Any:
        return computed

    def shutdown(self) -> None:
        pass


class Sending(Outlet, Scheduler):
    pass


class Core:
    """An engine core's client, of which nothing but its queue is used."""

    def __init__(self) -> None:
        self.outputs_queue: asyncio.Queue[EngineCoreOutputs | Exception] = asyncio.Queue()

    async def next(self) -> EngineCoreOutputs | Exception:
        return await asyncio.wait_for(self.outputs_queue.get(), 10)


def step(*request_ids: str) -> EngineCoreOutputs:
    return EngineCoreOutputs(outputs=[EngineCoreOutput(key, [7]) for key in request_ids])


Ends = tuple[Inlet, Sending, Core]


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    config = SimpleNamespace(scheduler_config=SimpleNamespace())
    inlet, core = Inlet(config), Core()
    sending = Sending(config)
    await inlet.open(as_client(core))
    yield inlet, sending, core
    sending.shutdown()
    inlet.close()


def as_client(core: object) -> AsyncMPClient:
    client: Any = core
    return client


async def test_steps_arrive_in_their_order_and_vllm_gets_none(ends: Ends) -> None:
    _, sending, core = ends
    for number in range(100):
        assert sending.update_from_output(None, {0: step(f"r{number}")}) == {}
    for number in range(100):
        arrived = await core.next()
        assert isinstance(arrived, EngineCoreOutputs)
        assert [output.request_id for output in arrived.outputs] == [f"r{number}"]


def logprobs(num_tokens: int) -> LogprobsTensors:
    return LogprobsTensors(
        torch.arange(num_tokens * 21, dtype=torch.int32).view(num_tokens, 21),
        torch.zeros((num_tokens, 21)),
        torch.zeros(num_tokens, dtype=torch.int32),
    )


@pytest.mark.parametrize(
    ("num_outputs", "num_tokens"),
    [
        pytest.param(128, 5, id="more parts than a byte counts"),
        pytest.param(2000, 20, id="many more"),
        pytest.param(2, 500_000, id="168 MB"),
    ],
)
async def test_a_step_may_be_of_any_size(ends: Ends, num_outputs: int, num_tokens: int) -> None:
    _, sending, core = ends
    outputs = [
        EngineCoreOutput(str(n), [7], new_prompt_logprobs_tensors=logprobs(num_tokens))
        for n in range(num_outputs)
    ]
    big = {0: EngineCoreOutputs(outputs=outputs)}
    # In the engine core it is another process that reads.
    sent = asyncio.create_task(asyncio.to_thread(sending.update_from_output, None, big))
    arrived = await asyncio.wait_for(core.outputs_queue.get(), 60)
    assert await sent == {}
    assert isinstance(arrived, EngineCoreOutputs)
    assert len(arrived.outputs) == num_outputs
    last = arrived.outputs[-1].new_prompt_logprobs_tensors
    assert last is not None
    assert torch.equal(last.logprob_token_ids, logprobs(num_tokens).logprob_token_ids)


async def test_while_it_is_held_the_engine_core_waits(ends: Ends) -> None:
    inlet, sending, core = ends
    inlet.hold()
    assert inlet.is_held
    output = EngineCoreOutput("r", [7], new_prompt_logprobs_tensors=logprobs(100_000))
    big = {0: EngineCoreOutputs(outputs=[output])}
    sent = asyncio.create_task(asyncio.to_thread(sending.update_from_output, None, big))
    done, _ = await asyncio.wait([sent], timeout=0.2)
    assert not done
    assert core.outputs_queue.empty()
    inlet.let_go()
    assert await sent == {}
    assert isinstance(await core.next(), EngineCoreOutputs)


async def test_a_step_that_says_nothing_wakes_nobody(ends: Ends) -> None:
    _, sending, core = ends
    sending.update_from_output(None, {0: EngineCoreOutputs(finished_requests={"r"})})
    sending.update_from_output(None, {0: step("next")})
    arrived = await core.next()
    assert isinstance(arrived, EngineCoreOutputs)
    assert arrived.outputs[0].request_id == "next"


def test_without_an_inlet_vllm_passes_the_steps_on() -> None:
    steps = {0: step("r")}
    assert (
        Sending(SimpleNamespace(scheduler_config=SimpleNamespace())).update_from_output(None, steps)
        is steps
    )


async def test_an_engine_whose_replica_is_gone_ends(ends: Ends) -> None:
    inlet, sending, _ = ends
    inlet.close()
    await asyncio.sleep(0)
    with pytest.raises(BrokenPipeError):
        sending.update_from_output(None, {0: step("r")})


async def test_bytes_that_are_no_step_reach_who_waits_for_one() -> None:
    config = SimpleNamespace(scheduler_config=SimpleNamespace())
    inlet, core = Inlet(config), Core()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.connect(config.scheduler_config.pdserve_outlet)
        await inlet.open(as_client(core))
        other.sendall(b"".join(pack_frame(Kind.STEP, [b"no step"])))
        assert isinstance(await core.next(), Exception)
    inlet.close()


async def test_another_user_is_not_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: nobody)
    monkeypatch.setattr(outlet, "_PATIENCE_S", 0.2)
    config = SimpleNamespace(scheduler_config=SimpleNamespace())
    inlet, sending = Inlet(config), Sending(config)
    with pytest.raises(ProtocolError, match="the engine core has not connected, and 1 of other"):
        await inlet.open(as_client(Core()))
    with pytest.raises(OSError, match=r"Broken pipe|reset"):
        sending.update_from_output(None, {0: step("r")})
    sending.shutdown()
    inlet.close()


async def test_other_users_do_not_keep_the_engine_core_out(monkeypatch: pytest.MonkeyPatch) -> None:
    num_others = 20 * outlet._MAX_WAITING
    users = [os.getuid() + 1] * num_others
    monkeypatch.setattr(outlet, "_user_of", lambda _: users.pop() if users else os.getuid())
    config = SimpleNamespace(scheduler_config=SimpleNamespace())
    inlet, core = Inlet(config), Core()

    def connect() -> list[socket.socket]:
        others = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(num_others)]
        for other in others:
            other.connect(config.scheduler_config.pdserve_outlet)
        return others

    # None of these waits for the replica to be done with its start.
    others = await asyncio.wait_for(asyncio.to_thread(connect), 30)
    sending = Sending(config)
    await inlet.open(as_client(core))
    sending.update_from_output(None, {0: step("r")})
    assert isinstance(await core.next(), EngineCoreOutputs)
    for other in others:
        other.close()
    sending.shutdown()
    inlet.close()


@pytest.mark.parametrize("has_connected", [False, True])
async def test_an_inlet_of_an_engine_that_did_not_start_leaves_nothing(has_connected: bool) -> None:
    config = SimpleNamespace(scheduler_config=SimpleNamespace())
    inlet = Inlet(config)
    sending = Sending(config) if has_connected else None
    if sending is not None:
        await asyncio.to_thread(inlet._engine_core.result, 10)
    inlet.close()
    await asyncio.to_thread(inlet._accepting.join, 10)
    assert not inlet._accepting.is_alive()
    late = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with late, pytest.raises(ConnectionRefusedError):
        late.connect(config.scheduler_config.pdserve_outlet)
    if sending is not None:
        sending.shutdown()


@pytest.mark.parametrize("has_connected", [False, True])
@pytest.mark.parametrize("num_turns", range(8))
async def test_an_inlet_that_is_closed_while_it_is_opened_says_so(
    num_turns: int, has_connected: bool
) -> None:
    config = SimpleNamespace(scheduler_config=SimpleNamespace())
    inlet = Inlet(config)
    sending = Sending(config) if has_connected else None
    if has_connected:
        await asyncio.to_thread(inlet._engine_core.result, 10)
    opening = asyncio.create_task(inlet.open(as_client(Core())))
    for _ in range(num_turns):
        await asyncio.sleep(0)
    is_open = opening.done()
    inlet.close()
    if is_open:
        await opening
    else:
        with pytest.raises(ChannelClosed):
            await asyncio.wait_for(opening, 10)
    await asyncio.sleep(0)
    if sending is not None:
        with pytest.raises(BrokenPipeError):
            sending.update_from_output(None, {0: step("r")})
        sending.shutdown()


async def test_a_client_that_keeps_its_steps_elsewhere_is_refused_by_name() -> None:
    inlet = Inlet(SimpleNamespace(scheduler_config=SimpleNamespace()))
    with pytest.raises(EngineInternalsChanged, match="outputs_queue"):
        await inlet.open(as_client(object()))
    inlet.close()


def test_vllm_can_copy_the_configuration() -> None:
    """As it does for draft models, and pickle it."""
    config = engine_args(resolve_model("demo"), {"max_model_len": 256}).create_engine_config()
    give_credentials(config, Credentials(secret="secret"))
    inlet = Inlet(config)
    replace(config, load_config=config.load_config)
    sent = pickle.loads(pickle.dumps(config))
    assert credentials_of(sent).secret == "secret"
    assert sent.scheduler_config.pdserve_outlet == config.scheduler_config.pdserve_outlet
    inlet.close()
