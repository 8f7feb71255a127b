"""SIGTERM under Ray's own handler: the first is a notice, the second is the end."""

import os
import signal
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from ray._private import worker

from engine.preemption import RAISES_EXIT, Preemption

Runner = Callable[[Callable[[], None]], int]


@pytest.fixture
def as_ray_worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runner]:
    """Runs a function where a Ray worker waits for tasks; returns the status it exits with."""
    monkeypatch.setattr(worker, RAISES_EXIT, getattr(worker, RAISES_EXIT))

    def run(tasks: Callable[[], None]) -> int:
        core_worker = SimpleNamespace(run_task_loop=tasks)
        with pytest.raises(SystemExit) as ending:
            worker.Worker.main_loop(SimpleNamespace(core_worker=core_worker))
        assert isinstance(ending.value.code, int)
        return ending.value.code

    before = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, before)


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_the_first_sigterm_is_a_notice(as_ray_worker: Runner) -> None:
    notices: list[str] = []
    Preemption(lambda: notices.append("told"))
    assert as_ray_worker(sigterm) == 0
    assert notices == ["told"]


def test_the_second_sigterm_ends_the_process(as_ray_worker: Runner) -> None:
    notices: list[str] = []
    Preemption(lambda: notices.append("told"))

    def twice() -> None:
        sigterm()
        sigterm()

    assert as_ray_worker(twice) == 1
    assert notices == ["told"]


def test_exit_is_the_end_without_a_notice(as_ray_worker: Runner) -> None:
    notices: list[str] = []
    preemption = Preemption(lambda: notices.append("told"))
    assert as_ray_worker(preemption.exit) == 1
    assert notices == []
