"""The line to an engine core: who is let in, and what becomes of what either side says."""

import asyncio
import os
import queue
import socket
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vllm import SamplingParams
from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineCoreRequestType,
)
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.engine.core_client import AsyncMPClient

from engine.errors import EngineInternalsChanged, ProtocolError
from engine.line import CoreEnd, HostEnd
from engine.wire import Kind, pack_frame


class Scheduler:
    """Stands where vLLM's does; every step puts out what it is given as the step's computation."""

    def __init__(self, config: Any) -> None:
        self.vllm_config = config

    def update_from_output(self, scheduled: Any, computed: Any) -> Any:
        return computed

    def shutdown(self) -> None:
        pass


class Sending(CoreEnd, Scheduler):
    pass


class Core:
    """An engine core's client, of which nothing but its queue is used."""

    def __init__(self) -> None:
        self.outputs_queue: asyncio.Queue[EngineCoreOutputs | Exception] = asyncio.Queue()

    async def next(self) -> EngineCoreOutputs | Exception:
        return await asyncio.wait_for(self.outputs_queue.get(), 10)


def step(*request_ids: str) -> EngineCoreOutputs:
    return EngineCoreOutputs(outputs=[EngineCoreOutput(key, [7]) for key in request_ids])


class EngineCore:
    """Stands where vLLM's engine core does: keeps what reaches its queue."""

    def __init__(self) -> None:
        self.input_queue: queue.Queue[tuple[EngineCoreRequestType, Any]] = queue.Queue()
        self.aborts_queue: queue.Queue[list[str]] = queue.Queue()
        self.failed: list[str] = []

    def preprocess_add_request(self, request: EngineCoreRequest) -> str:
        if request.request_id == "bad":
            raise ValueError
        return str(request.request_id)

    def _handle_request_preproc_error(self, request: EngineCoreRequest) -> None:
        self.failed.append(request.request_id)

    def next(self) -> tuple[EngineCoreRequestType, Any]:
        return self.input_queue.get(timeout=10)


Ends = tuple[HostEnd, Sending, Core]


@pytest.fixture(autouse=True)
def without_zmq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineCoreProc, "process_input_sockets", lambda core: None)


@pytest.fixture
async def ends() -> AsyncIterator[Ends]:
    config = SimpleNamespace()
    host, core = HostEnd(config), Core()
    sending = Sending(config)
    await host.open(as_client(core))
    yield host, sending, core
    sending.shutdown()
    host.close()


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


async def test_a_step_that_says_nothing_wakes_nobody(ends: Ends) -> None:
    _, sending, core = ends
    sending.update_from_output(None, {0: EngineCoreOutputs(finished_requests={"r"})})
    sending.update_from_output(None, {0: step("next")})
    arrived = await core.next()
    assert isinstance(arrived, EngineCoreOutputs)
    assert arrived.outputs[0].request_id == "next"


def test_without_an_inlet_vllm_passes_the_steps_on() -> None:
    steps = {0: step("r")}
    assert Sending(SimpleNamespace()).update_from_output(None, steps) is steps


def added(request_id: str) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=[1, 2],
        mm_features=None,
        sampling_params=SamplingParams(),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def reading() -> EngineCore:
    """An engine core whose thread reads the line that was connected last."""
    engine: Any = EngineCore()
    EngineCoreProc.process_input_sockets(engine)
    return cast(EngineCore, engine)


async def test_requests_and_aborts_reach_the_engine_in_their_order(ends: Ends) -> None:
    host, _, _ = ends
    engine = reading()
    for number in range(50):
        host.add(added(f"r{number}"))
        host.abort([f"r{number}"])
    await asyncio.sleep(0)
    for number in range(50):
        assert engine.next() == (EngineCoreRequestType.ADD, f"r{number}")
        assert engine.next() == (EngineCoreRequestType.ABORT, [f"r{number}"])
        assert engine.aborts_queue.get(timeout=10) == [f"r{number}"]


async def test_a_request_that_cannot_be_prepared_fails_alone(ends: Ends) -> None:
    host, _, _ = ends
    engine = reading()
    host.add(added("bad"))
    host.add(added("good"))
    assert engine.next() == (EngineCoreRequestType.ADD, "good")
    assert engine.failed == ["bad"]


async def test_an_engine_that_can_hear_no_more_ends() -> None:
    config = SimpleNamespace()
    host = HostEnd(config)
    sending = Sending(config)
    await host.open(as_client(Core()))
    engine = reading()
    assert host._transport is not None
    host._transport.write(pack_frame(Kind.ADD, [b"no request"]))
    assert engine.next() == (EngineCoreRequestType.EXECUTOR_FAILED, b"")
    sending.shutdown()
    host.close()


async def test_an_engine_core_with_other_queues_is_refused_by_name(ends: Ends) -> None:
    engine: Any = object()
    with pytest.raises(EngineInternalsChanged, match="input_queue"):
        EngineCoreProc.process_input_sockets(engine)


async def test_what_is_sent_to_an_engine_that_is_gone_is_nobodys(ends: Ends) -> None:
    host, _, _ = ends
    host.close()
    host.add(added("late"))


async def test_an_engine_whose_replica_is_gone_ends(ends: Ends) -> None:
    host, sending, _ = ends
    host.close()
    await asyncio.sleep(0)
    with pytest.raises(BrokenPipeError):
        sending.update_from_output(None, {0: step("r")})


async def test_bytes_that_are_no_step_reach_who_waits_for_one() -> None:
    config = SimpleNamespace()
    host, core = HostEnd(config), Core()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.connect(config.pdserve_line)
        await host.open(as_client(core))
        other.sendall(pack_frame(Kind.STEP, [b"no step"]))
        assert isinstance(await core.next(), Exception)
    host.close()


async def test_another_user_is_not_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace()
    host = HostEnd(config)
    sending = Sending(config)
    nobody = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: nobody)
    with pytest.raises(ProtocolError, match="has connected in the engine core's place"):
        await host.open(as_client(Core()))
    sending.shutdown()


async def test_a_client_that_keeps_its_steps_elsewhere_is_refused_by_name() -> None:
    host = HostEnd(SimpleNamespace())
    with pytest.raises(EngineInternalsChanged, match="outputs_queue"):
        await host.open(as_client(object()))
    host.close()
