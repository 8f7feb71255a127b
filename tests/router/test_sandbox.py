"""The sandbox: what a task may use, what becomes of it, and of the processes."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from router.clients import CLIENT
from router.errors import SandboxUnavailable, TaskRefused
from router.sandbox import process as sandbox_process
from router.sandbox import queue as sandbox_queue
from router.sandbox.limits import TaskLimits, Work, result_of
from router.sandbox.process import SandboxProcess
from router.sandbox.queue import NUM_QUICK, QUICK_S, Sandbox
from router.sandbox.turns import Turns
from router.sandbox.wire import Ended

ODD_ZYGOTE = (str(Path(__file__).parent / "odd_zygote.py"),)
LIMITS = TaskLimits(cpu_s=1.0, memory_bytes=64 * 2**20)


@asynccontextmanager
async def odd_process() -> AsyncIterator[SandboxProcess]:
    process = SandboxProcess(ODD_ZYGOTE)
    process.start()
    try:
        yield process
    finally:
        await process.close()


@pytest.fixture
async def process() -> AsyncIterator[SandboxProcess]:
    async with odd_process() as process:
        yield process


@pytest.fixture
async def sandbox(process: SandboxProcess) -> Sandbox:
    return Sandbox(process, LIMITS)


async def run(sandbox: Sandbox, task: str, payload: Any = None) -> Any:
    work = Work(task=task, subject="the text", verb="parse", participle="parsed")
    return json.loads(await sandbox.run(work, json.dumps(payload).encode()))


def children_of(process: SandboxProcess) -> list[psutil.Process]:
    return psutil.Process(process.pid).children() if process.pid is not None else []


async def test_a_result_comes_back_whatever_it_is(sandbox: Sandbox) -> None:
    for payload in ({"a": [1, None, "ü"]}, "x" * 1_000_000):
        assert await run(sandbox, "echo", payload) == payload


@pytest.mark.parametrize(
    ("task", "payload", "message"),
    [
        pytest.param(
            "crash", None, "the text cannot be parsed: its process ended with SIGSEGV", id="crash"
        ),
        pytest.param("spin", None, "the text takes longer than 1 s to parse", id="time"),
        pytest.param("allocate", 10**9, "the text takes more than 64 MiB to parse", id="memory"),
        pytest.param(
            "leave", 3, "the text cannot be parsed: its process ended with exit status 3", id="exit"
        ),
        pytest.param("leave", 0, "the text cannot be parsed", id="no-word"),
        pytest.param("allocate", -1, "negative count", id="exception"),
    ],
)
async def test_what_fails_is_refused_and_nothing_else_ends(
    process: SandboxProcess, sandbox: Sandbox, task: str, payload: Any, message: str
) -> None:
    _, zygote = await run(sandbox, "pid")
    failing = asyncio.gather(run(sandbox, task, payload), return_exceptions=True)
    assert await run(sandbox, "echo", 1) == 1
    (error,) = await failing
    assert isinstance(error, TaskRefused)
    assert error.message == message
    assert (await run(sandbox, "pid"))[1] == zygote == process.pid


async def test_each_task_has_a_process_of_its_own(sandbox: Sandbox) -> None:
    (first, _), (second, _) = await asyncio.gather(run(sandbox, "pid"), run(sandbox, "pid"))
    assert first != second
    assert not psutil.pid_exists(first)


async def test_what_waits_and_does_not_compute_ends_too(process: SandboxProcess) -> None:
    ended = await process.run("sleep", b"null", TaskLimits(cpu_s=0.001))
    assert ended.was_killed
    with pytest.raises(SandboxUnavailable):
        result_of(ended, Work(task="", subject="", verb="", participle=""), LIMITS)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_child_that_others_end_says_nothing_of_its_task(
    process: SandboxProcess, sandbox: Sandbox, number: signal.Signals
) -> None:
    running = asyncio.create_task(run(sandbox, "sleep"))
    while not (children := children_of(process)):  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.01)
    children[0].send_signal(number)
    with pytest.raises(SandboxUnavailable):
        await running


async def test_a_zygote_that_was_killed_is_replaced(
    process: SandboxProcess, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox_process, "RESTART_S", 0.01)
    child, zygote = await run(sandbox, "pid")
    sleeping = asyncio.create_task(process.run("spin", b"null", LIMITS))
    while not psutil.Process(zygote).children():  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.01)
    (child,) = (each.pid for each in psutil.Process(zygote).children())
    os.kill(zygote, signal.SIGKILL)
    assert await run(sandbox, "echo", "again") == "again"
    assert process.pid != zygote
    # What ran there has run again, in the next one.
    assert (await sleeping).exit_code == -signal.SIGPROF
    psutil.wait_procs([psutil.Process(child)] if psutil.pid_exists(child) else [], timeout=30)
    assert not psutil.pid_exists(child)


async def test_closing_ends_every_process() -> None:
    async with odd_process() as process:
        running = asyncio.create_task(process.run("sleep", b"null", LIMITS))
        while not children_of(process):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)
        zygote = psutil.Process(process.pid)
        everybody = [zygote, *zygote.children()]
    gone, alive = psutil.wait_procs(everybody, timeout=30)
    assert len(gone) == 2
    assert not alive
    running.cancel()


async def test_a_task_that_nobody_waits_for_ends(process: SandboxProcess, sandbox: Sandbox) -> None:
    await run(sandbox, "echo")
    running = asyncio.create_task(process.run("sleep", b"null", TaskLimits(cpu_s=1000)))
    while not (children := children_of(process)):  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.01)
    running.cancel()
    await asyncio.wait([running])
    await run(sandbox, "echo")
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive


ROUTER = f"""
import asyncio, sys
from router.sandbox.process import SandboxProcess
from router.sandbox.limits import TaskLimits

async def main():
    process = SandboxProcess({ODD_ZYGOTE!r})
    process.start()
    ended = await process.run("pid", b"null", TaskLimits())
    print(ended.output.decode(), flush=True)
    await process.run("sleep", b"null", TaskLimits(cpu_s=1000))

asyncio.run(main())
"""


def test_no_process_outlives_a_killed_router() -> None:
    with subprocess.Popen([sys.executable, "-c", ROUTER], stdout=subprocess.PIPE) as router:
        assert router.stdout is not None
        zygote = psutil.Process(json.loads(router.stdout.readline())["result"][1])
        while not (children := zygote.children()):
            pass
        router.kill()
        _, alive = psutil.wait_procs([zygote, *children], timeout=30)
    assert not alive


class Slow:
    """A process whose tasks always want more time. The test says when they have had all of it."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, float]] = []
        self.may_end = asyncio.Event()
        self._has_asked = asyncio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._has_asked.clear()
            await self._has_asked.wait()

    async def run(self, task: str, payload: bytes, limits: TaskLimits) -> Ended:
        self.asked.append((task, limits.cpu_s))
        self._has_asked.set()
        if task == "good":
            return Ended(job_id=0, exit_code=0, output=b'{"result": 1}')
        if limits.cpu_s != QUICK_S:
            await self.may_end.wait()
        return Ended(job_id=0, exit_code=-signal.SIGPROF, output=b"")


async def test_many_that_take_long_hold_up_none_that_does_not() -> None:
    slow = Slow()
    sandbox = Sandbox(slow, TaskLimits(cpu_s=5.0))  # type: ignore[arg-type]
    many = [asyncio.create_task(run(sandbox, "long")) for _ in range(10)]
    # One has all of its time now, and the others wait for it: no first try does.
    await slow.until(lambda: ("long", 5.0) in slow.asked)
    assert await run(sandbox, "good") == 1
    assert slow.asked.count(("long", 5.0)) == 1
    slow.may_end.set()
    answers = await asyncio.gather(*many, return_exceptions=True)
    assert {type(each) for each in answers} == {TaskRefused}


async def test_a_queue_that_is_full_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_queue, "MAX_QUICK_WAITING", 3)
    slow = Slow()
    sandbox = Sandbox(slow, TaskLimits(cpu_s=0.1))  # type: ignore[arg-type]
    tasks = [asyncio.create_task(run(sandbox, "long")) for _ in range(2 + 3)]
    await slow.until(lambda: len(slow.asked) == 2)
    with pytest.raises(SandboxUnavailable):
        await run(sandbox, "good")
    slow.may_end.set()
    await asyncio.wait(tasks)
    assert await run(sandbox, "good") == 1


async def test_who_has_gone_does_not_wait_any_more() -> None:
    turns = Turns(1, max_waiting=1)
    async with turns.turn("a"):
        waiting = asyncio.create_task(take(turns, "a"))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
    async with turns.turn("a"):
        pass


async def test_a_turn_that_comes_with_the_end_of_the_wait_is_not_lost() -> None:
    turns = Turns(1, max_waiting=1)
    async with turns.turn("a"):
        waiting = asyncio.create_task(take(turns, "a"))
        await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    await asyncio.wait_for(take(turns, "a"), 5)


async def take(turns: Turns, client: str, taken: list[str] | None = None) -> None:
    async with turns.turn(client):
        if taken is not None:
            taken.append(client)


async def test_clients_take_turns_however_much_one_has() -> None:
    turns, taken = Turns(1, max_waiting=100), list[str]()
    async with turns.turn("a"):
        clients = ["a"] * 50 + ["b", "b", "c"]
        waiting = [asyncio.create_task(take(turns, client, taken)) for client in clients]
        await asyncio.sleep(0)
    await asyncio.gather(*waiting)
    assert taken[:6] == ["a", "b", "c", "a", "b", "a"]
    assert len(taken) == len(clients)


async def test_who_has_most_waiting_is_refused_where_too_many_wait() -> None:
    turns, taken = Turns(1, max_waiting=3), list[str]()
    async with turns.turn("a"):
        many = [asyncio.create_task(take(turns, "a", taken)) for _ in range(4)]
        few = [asyncio.create_task(take(turns, client, taken)) for client in "bc"]
        late = asyncio.create_task(take(turns, "d", taken))
        await asyncio.sleep(0)
    answers = await asyncio.gather(*many, *few, late, return_exceptions=True)
    refused = [isinstance(each, SandboxUnavailable) for each in answers]
    assert refused == [False, True, True, True, False, False, True], "with one each, the last"
    assert taken == ["a", "b", "c"]


class OneByOne:
    """A process whose long tasks end one by one, as the test says."""

    def __init__(self) -> None:
        self.ends = asyncio.Queue[None]()
        self.num_long = 0

    async def run(self, task: str, payload: bytes, limits: TaskLimits) -> Ended:
        if task == "long":
            self.num_long += 1
            await self.ends.get()
        return Ended(job_id=0, exit_code=0, output=b'{"result": 1}')


async def test_one_client_with_much_that_takes_long_holds_up_no_other() -> None:
    process = OneByOne()
    sandbox = Sandbox(process, TaskLimits())  # type: ignore[arg-type]
    CLIENT.set("attacker")
    many = [asyncio.create_task(run(sandbox, "long")) for _ in range(200)]
    await asyncio.sleep(0)
    assert process.num_long == NUM_QUICK
    CLIENT.set("other")
    good = [asyncio.create_task(run(sandbox, "good")) for _ in range(2)]
    await asyncio.sleep(0)
    for _ in range(NUM_QUICK + 1):
        process.ends.put_nowait(None)
    assert await asyncio.gather(*good) == [1, 1]
    assert sum(task.done() for task in many) <= NUM_QUICK + 1
    for _ in many:
        process.ends.put_nowait(None)
    await asyncio.gather(*many)
