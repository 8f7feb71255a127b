"""What the harness sees of processes, and does to them."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from benchmarks.chaos_processes import RouterProcess, count_connections, suspend

BUSY = """
import threading
for _ in range(4):
    threading.Thread(target=lambda: [None for _ in iter(int, 1)]).start()
print("busy", flush=True)
"""


@pytest.fixture
def busy() -> Iterator[subprocess.Popen[bytes]]:
    """A process whose threads all want to run."""
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"busy\n"
        yield process
        process.kill()


def test_connections_are_counted_before_they_are_accepted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        router = RouterProcess(pid=os.getpid(), port=server.getsockname()[1])
        assert count_connections(router) == 0
        with socket.create_connection(server.getsockname()):
            assert count_connections(router) == 1


def test_a_suspended_process_has_no_running_thread(busy: subprocess.Popen[bytes]) -> None:
    assert suspend(busy.pid)
    seen = psutil.Process(busy.pid)
    states = {psutil.Process(each.id).status() for each in seen.threads()}
    assert states == {psutil.STATUS_STOPPED}


def test_what_has_ended_is_not_suspended(busy: subprocess.Popen[bytes]) -> None:
    busy.kill()
    busy.wait()
    assert not suspend(busy.pid)
