"""A router hears of an engine that ended at its start; where none does, that is no new error."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve

from engine import start_failure
from engine.exit_cause import EngineExit

KILLED = EngineExit(cause="SIGKILL", text="the engine was ended by SIGKILL")


async def test_one_router_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    async def ended(*arguments: Any) -> None:
        told.append(arguments)

    def handle(deployment: str, application: str) -> SimpleNamespace:
        assert (deployment, application) == ("router", "app")
        return SimpleNamespace(engine_ended_at_start=SimpleNamespace(remote=ended))

    monkeypatch.setattr(serve, "get_deployment_handle", handle)
    await start_failure.tell_router("app", "decode", "r", KILLED)
    assert told == [("decode", "r", KILLED)]


async def test_no_router_can_be_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def handle(*_: str) -> SimpleNamespace:
        return SimpleNamespace(
            engine_ended_at_start=SimpleNamespace(remote=lambda *_: asyncio.Event().wait())
        )

    monkeypatch.setattr(serve, "get_deployment_handle", handle)
    monkeypatch.setattr(start_failure, "TIMEOUT_S", 0.01)
    await start_failure.tell_router("app", "decode", "r", KILLED)
    assert "no router was told" in caplog.text
