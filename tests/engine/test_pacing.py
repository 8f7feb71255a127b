"""The engine core's sleep after a step without a model run, and when there is none."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.engine import core

from engine import pacing


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The sleeps that reached the real clock; vLLM's name for it is put back."""
    sleeps: list[float] = []
    clock = SimpleNamespace(sleep=sleeps.append, monotonic=time.monotonic)
    monkeypatch.setattr(pacing, "time", clock)
    monkeypatch.setattr(core, "time", time)
    return sleeps


@pytest.mark.parametrize(
    ("idle", "expected"),
    [
        pytest.param(True, [0.001], id="nothing has arrived"),
        pytest.param(False, [], id="a step is due"),
    ],
)
def test_it_sleeps_only_if_idle(slept: list[float], idle: bool, expected: list[float]) -> None:
    pacing.sleep_only_if(lambda: idle)

    core.time.sleep(0.001)

    assert slept == expected


def test_it_is_asked_at_every_sleep(slept: list[float]) -> None:
    arrived: set[str] = set()
    pacing.sleep_only_if(lambda: not arrived)

    core.time.sleep(0.001)
    arrived.add("r")
    core.time.sleep(0.002)
    arrived.clear()
    core.time.sleep(0.003)

    assert slept == [0.001, 0.003]


def test_the_rest_of_the_clock_is_as_it_was(slept: list[float]) -> None:
    pacing.sleep_only_if(lambda: True)
    clock: Any = core.time

    assert clock.monotonic is time.monotonic
