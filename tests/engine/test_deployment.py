"""How a replica leaves: told by Serve, by SIGTERM, or by both."""

import asyncio
import signal
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray._private import worker

from engine.deployment import EngineDeployment, EngineSettings
from engine.errors import ReplicaLeaves
from engine.exit_cause import EngineExit
from engine.preemption import RAISES_EXIT

SETTINGS = EngineSettings(
    model="demo",
    options={},
    lease_s=30.0,
    shared_memory="auto",
    read_timeout_s=5.0,
    progress_delay_us=None,
    connector="nixl",
    backends=("UCX",),
    stall_timeout_s=10.0,
    drain_s=30.0,
)
NOTICE = "The process receives a SIGTERM."


class FakeServer:
    """A phase's server whose drain ends when the test says so."""

    def __init__(self, settings: EngineSettings) -> None:
        self.finished = asyncio.Event()
        self.calls: list[str] = []
        self.ended: asyncio.Future[EngineExit] = asyncio.get_running_loop().create_future()

    async def start(self) -> None:
        self.calls.append("start")

    async def check_health(self) -> None:
        pass

    async def drain(self) -> None:
        self.calls.append("drain")
        await self.finished.wait()

    def stop(self) -> None:
        self.calls.append("stop")


class Deployment(EngineDeployment):
    """Serve awaits the real one; Python would call it once more and await nothing."""

    def __del__(self) -> None:  # type: ignore[override]
        pass


class Replica:
    """A deployment as Serve and Ray handle it."""

    def __init__(self) -> None:
        self.deployment = Deployment.__new__(Deployment)
        self.num_exits = 0

    @property
    def server(self) -> FakeServer:
        server = self.deployment._server
        assert isinstance(server, FakeServer)
        return server

    async def start(self) -> None:
        await EngineDeployment.__init__(self.deployment, "fake_server:FakeServer", SETTINGS)

    async def receive_sigterm(self) -> None:
        getattr(worker, RAISES_EXIT)(NOTICE, exit_code=1)
        await asyncio.sleep(0)  # the notice crosses into the loop
        await asyncio.sleep(0)  # and the drain begins

    async def end_by_serve(self) -> None:
        await EngineDeployment.__del__(self.deployment)

    def exited(self, *_: Any) -> None:
        self.num_exits += 1


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch) -> Iterator[Replica]:
    monkeypatch.setitem(sys.modules, "fake_server", SimpleNamespace(FakeServer=FakeServer))
    monkeypatch.setattr(worker, RAISES_EXIT, getattr(worker, RAISES_EXIT))
    replica = Replica()
    before = signal.signal(signal.SIGTERM, replica.exited)
    yield replica
    signal.signal(signal.SIGTERM, before)


async def test_serve_ends_it(replica: Replica) -> None:
    await replica.start()
    await replica.deployment.check_health()
    ending = asyncio.create_task(replica.end_by_serve())
    await asyncio.sleep(0)
    replica.server.finished.set()
    await ending
    assert replica.server.calls == ["start", "drain", "stop"]
    assert replica.num_exits == 0


async def test_sigterm_ends_it(replica: Replica) -> None:
    await replica.start()
    await replica.receive_sigterm()
    with pytest.raises(ReplicaLeaves):
        await replica.deployment.check_health()
    assert (replica.server.calls, replica.num_exits) == (["start", "drain"], 0)
    replica.server.finished.set()
    async with asyncio.timeout(10):
        await asyncio.shield(replica.deployment._leave())
        await asyncio.sleep(0)
    assert (replica.server.calls, replica.num_exits) == (["start", "drain", "stop"], 1)


async def test_serve_ends_it_while_it_drains_after_sigterm(replica: Replica) -> None:
    """Serve waits for the same drain, whose time has been running since the signal."""
    await replica.start()
    await replica.receive_sigterm()
    ending = asyncio.create_task(replica.end_by_serve())
    await asyncio.sleep(0)
    assert not ending.done()
    replica.server.finished.set()
    await ending
    assert replica.server.calls == ["start", "drain", "stop"]


async def test_without_its_engine_it_exits_and_says_why(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(worker, RAISES_EXIT, lambda message, exit_code=0: said.append(message))
    await replica.start()
    replica.server.ended.set_result(EngineExit(cause="SIGILL", text="the engine was ended"))
    await asyncio.sleep(0)
    assert replica.num_exits == 1
    getattr(worker, RAISES_EXIT)(NOTICE, exit_code=1)  # as Ray's handler of that signal does
    assert said == ["the engine was ended"]
