"""How a router leaves when its process gets SIGTERM."""

import asyncio
import signal
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray._private import worker

from engine.errors import ReplicaLeaves
from engine.preemption import RAISES_EXIT
from router.admit import AdmissionLimits
from router.recovery import RecoveryLimits
from router.server import Router
from router.settings import FrontendSettings, RouterSettings, Targets

NOTICE = "The process receives a SIGTERM."
Unwrapped: type[Any] = Router.__bases__[0]
"""Around it is what Serve adds, which wants a whole replica."""


def settings(*, drain_s: float) -> RouterSettings:
    return RouterSettings(
        frontend=FrontendSettings(model="demo", served_name="demo"),
        policy="p2c",
        num_routers=1,
        targets=Targets(admission=AdmissionLimits()),
        recovery=RecoveryLimits(max_moves=3, max_wait_s=120.0, stall_timeout_s=10.0),
        drain_s=drain_s,
    )


class FakeAssembly:
    def __init__(self, settings: RouterSettings) -> None:
        pass

    async def build(self) -> object:
        return object()

    def check_front_end(self) -> None:
        pass


class Replica:
    """Serve's and Ray's parts of a replica."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.drained = asyncio.Event()
        self.exited = asyncio.Event()
        self.perform_graceful_shutdown = SimpleNamespace(remote=self._end)

    def _end(self) -> SimpleNamespace:
        self.calls.append("shutdown")
        return SimpleNamespace(as_future=lambda: asyncio.ensure_future(self.drained.wait()))

    def exit(self, *_: Any) -> None:
        self.calls.append("exit")
        self.exited.set()

    async def start(self, *, drain_s: float = 30.0) -> Any:
        router = Unwrapped(settings(drain_s=drain_s), prefill=None, decode=None)
        await router.__serve_build_asgi_app__()
        return router


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch) -> Iterator[Replica]:
    replica = Replica()
    context = SimpleNamespace(current_actor=replica)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setitem(sys.modules, "router.assembly", SimpleNamespace(Assembly=FakeAssembly))
    monkeypatch.setattr(worker, RAISES_EXIT, getattr(worker, RAISES_EXIT))
    before = signal.signal(signal.SIGTERM, replica.exit)
    yield replica
    signal.signal(signal.SIGTERM, before)


async def receive_sigterm() -> None:
    getattr(worker, RAISES_EXIT)(NOTICE, exit_code=1)
    await asyncio.sleep(0)  # the notice crosses into the loop
    await asyncio.sleep(0)  # and the end begins


async def test_it_is_replaced_at_once_and_ends_when_its_answers_have(replica: Replica) -> None:
    router = await replica.start()
    await router.check_health()
    await receive_sigterm()
    with pytest.raises(ReplicaLeaves):
        await router.check_health()
    assert replica.calls == ["shutdown"]
    replica.drained.set()
    async with asyncio.timeout(10):
        await replica.exited.wait()
    assert replica.calls == ["shutdown", "exit"]


async def test_it_waits_no_longer_than_it_may(replica: Replica) -> None:
    await replica.start(drain_s=0.0)
    await receive_sigterm()
    async with asyncio.timeout(10):
        await replica.exited.wait()
    assert not replica.drained.is_set()
