"""HAProxy as Serve starts it: it ends with its Ray, and does not start beside a stranger."""

import asyncio
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from haproxy_config import haproxy_api, haproxy_of_serve

from cluster.haproxy import port_problem, take_over
from cluster.ports import LOCALHOST, is_free, listeners, pick_free

COMMAND = [sys.executable, "-c", "from cluster.haproxy import main; main()", "-db", "-f"]
# As Ray's workers, it has a process group of its own.
PARENT = """\
import os, subprocess, sys
os.setpgid(0, 0)
child = subprocess.Popen(sys.argv[1:])
print(child.pid, flush=True)
child.wait()
"""
WAIT_S = 60


@pytest.fixture
def ports() -> tuple[int, int, int, int]:
    api, router, metrics, stats = pick_free([None] * 4)
    return api, router, metrics, stats


@pytest.fixture
def started() -> Iterator[contextlib.ExitStack]:
    """What a test starts, in case it fails."""
    with contextlib.ExitStack() as stack:
        yield stack


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


def with_parent(
    config: Path, started: contextlib.ExitStack, *arguments: str
) -> tuple[psutil.Process, psutil.Process]:
    """HAProxy and the process that has started it."""
    return start_telling([sys.executable, "-c", PARENT, *COMMAND, str(config), *arguments], started)


def start_telling(
    command: Sequence[str], started: contextlib.ExitStack, *, executable: str | None = None
) -> tuple[psutil.Process, psutil.Process]:
    """The process whose id a command tells in its first line, and the command's own."""
    parent = subprocess.Popen(
        command, executable=executable, env=environment(), stdout=subprocess.PIPE, text=True
    )
    started.enter_context(parent)
    started.callback(parent.kill)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    started.callback(kill, child)
    return child, psutil.Process(parent.pid)


async def listening(process: psutil.Process, port: int) -> None:
    """Waits until the process has the port."""
    async with asyncio.timeout(WAIT_S):
        while process not in listeners(port):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def ended(process: psutil.Process) -> None:
    async with asyncio.timeout(WAIT_S):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_it_ends_with_ray_and_frees_the_port(
    tmp_path: Path, ports: tuple[int, int, int, int], started: contextlib.ExitStack
) -> None:
    proxy, parent = with_parent(haproxy_of_serve(tmp_path, ports), started)
    await listening(proxy, ports[0])
    assert proxy.name() == "haproxy"
    (watch,) = proxy.children()
    parent.kill()
    await ended(proxy)
    await ended(watch)
    assert is_free(ports[0])


async def test_it_outlives_its_keeper_and_the_next_one_takes_over(
    tmp_path: Path, ports: tuple[int, int, int, int], started: contextlib.ExitStack
) -> None:
    config = haproxy_of_serve(tmp_path, ports)
    raylet = with_raylet(tmp_path, config, started)
    first = await next_proxy(raylet, config)
    await listening(first, ports[0])
    keeper = first.parent()
    assert keeper is not None
    assert keeper.parent() == raylet
    keeper.kill()
    await ended(keeper)
    with contextlib.suppress(ProcessLookupError):  # nobody is left in it
        os.killpg(keeper.pid, signal.SIGTERM)  # as Ray does with the group of a worker that died
    assert os.getpgid(first.pid) == first.pid
    second = await next_proxy(raylet, config)
    await listening(second, ports[0])
    await ended(first)
    assert not is_free(ports[0])
    raylet.kill()
    await ended(second)
    assert is_free(ports[0])


def with_raylet(folder: Path, config: Path, started: contextlib.ExitStack) -> psutil.Process:
    """A process of that name, which starts a keeper of HAProxy, and another when that has ended."""
    (folder / "raylet").symlink_to("/bin/bash")
    keeper = shlex.join([sys.executable, "-c", PARENT, *COMMAND, str(config)])
    raylet = subprocess.Popen(
        [str(folder / "raylet"), "-c", f"while true; do {keeper}; done"], env=environment()
    )
    started.enter_context(raylet)
    started.callback(raylet.kill)
    return psutil.Process(raylet.pid)


async def next_proxy(raylet: psutil.Process, config: Path) -> psutil.Process:
    """The HAProxy of the keeper that there is now."""
    async with asyncio.timeout(WAIT_S):
        while True:
            for process in raylet.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    if process.name() == "haproxy" and str(config) in process.cmdline():
                        return process
            await asyncio.sleep(0.05)


async def test_one_that_took_over_ends_too(
    tmp_path: Path, ports: tuple[int, int, int, int], started: contextlib.ExitStack
) -> None:
    config = haproxy_of_serve(tmp_path, ports)
    first, first_parent = with_parent(config, started)
    await listening(first, ports[0])
    second, second_parent = with_parent(config, started, "-sf", str(first.pid))
    await listening(second, ports[0])
    await ended(first)
    first_parent.kill()
    second_parent.kill()
    await ended(second)
    assert is_free(ports[0])


@contextlib.asynccontextmanager
async def router(port: int) -> AsyncIterator[tuple[asyncio.Event, asyncio.Event]]:
    """Answers in two parts: it sets the first event after one, and waits for the second event."""
    begun, goes_on = asyncio.Event(), asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
        if b"POST" in head:
            writer.write(b"o")
            await writer.drain()
            begun.set()
            await goes_on.wait()
            writer.write(b"k")
        else:
            writer.write(b"ok")  # a health check
        writer.close()

    server = await asyncio.start_server(answer, LOCALHOST, port)
    async with server:
        yield begun, goes_on


async def test_an_answer_that_has_begun_is_finished(
    tmp_path: Path, ports: tuple[int, int, int, int], started: contextlib.ExitStack
) -> None:
    async with router(ports[1]) as (begun, goes_on), asyncio.timeout(WAIT_S):
        proxy, parent = with_parent(haproxy_of_serve(tmp_path, ports), started)
        await listening(proxy, ports[0])
        reader, writer = await asyncio.open_connection(LOCALHOST, ports[0])
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
        await begun.wait()
        parent.kill()
        while not is_free(ports[0]):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        goes_on.set()
        assert (await reader.readuntil(b"ok")).endswith(b"\r\n\r\nok")
        writer.close()
        await ended(proxy)


@pytest.mark.parametrize("index", [0, 2, 3], ids=["api", "metrics", "statistics"])
def test_it_says_who_holds_its_port(
    index: int, tmp_path: Path, ports: tuple[int, int, int, int]
) -> None:
    config = haproxy_of_serve(tmp_path, ports)
    with socket.create_server((LOCALHOST, ports[index])):
        told = subprocess.run(
            [*COMMAND, str(config)], env=environment(), stderr=subprocess.PIPE, text=True,
            timeout=WAIT_S,
        )  # fmt: skip
    assert told.returncode == 1
    assert f"pdserve-haproxy: port {ports[index]} is in use by " in told.stderr
    assert f"process {os.getpid()}; end that, or choose another port" in told.stderr


def under_the_name_of_ray(config: Path, started: contextlib.ExitStack) -> psutil.Process:
    """An HAProxy whose parent is called as Serve's keeper of it is."""
    command = ["ray::HAProxyManager", "-c", f'"$@" {config} & echo $!; wait', "sh", *COMMAND]
    child, _ = start_telling(command, started, executable="/bin/sh")
    return child


async def test_only_an_haproxy_of_a_living_ray_may_share_the_port(
    tmp_path: Path, ports: tuple[int, int, int, int], started: contextlib.ExitStack
) -> None:
    config = haproxy_of_serve(tmp_path, ports)
    proxy, _ = with_parent(config, started)
    await listening(proxy, ports[0])
    assert port_problem(config.read_text()) == (
        f"port {' and '.join(map(str, sorted({ports[0], *ports[2:]})))} is in use by haproxy, "
        f"process {proxy.pid}, left behind by a Ray that has ended; end that, or choose another "
        "port"
    )
    proxy.send_signal(signal.SIGTERM)
    await ended(proxy)
    await listening(under_the_name_of_ray(config, started), ports[0])
    assert port_problem(config.read_text()) is None


async def test_serve_knows_its_processes_by_their_file(
    tmp_path: Path, ports: tuple[int, int, int, int], started: contextlib.ExitStack
) -> None:
    """It tells those that a reload has replaced, and would not go, once more to go."""
    config = haproxy_of_serve(tmp_path, ports)
    proxy, _ = with_parent(config, started)
    await listening(proxy, ports[0])
    assert haproxy_api(tmp_path, ports)._is_our_haproxy(proxy.pid)
    assert config.read_text().count("option http-buffer-request") == 1


def test_ports_are_asked_for_only_where_somebody_answers(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    config = f"global\n    stats socket {path} mode 666 level admin\n"
    before = [psutil.Process()]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        assert take_over(config, before) == ["-sf", str(os.getpid()), "-x", str(path)]
    assert take_over(config, before) == ["-sf", str(os.getpid())]
