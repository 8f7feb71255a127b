"""A node's faults, each on processes of this test's own."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from benchmarks.chaos_faults import Kind
from benchmarks.chaos_node import JUMP_S, Node, node_for
from benchmarks.systems import Launch

CONFIG = Path("benchmarks/configs/chaos.yaml")

_CLOCKS = """
import sys, threading, time
for _ in sys.stdin:
    threading.Event().wait(0.01)
    print(time.time(), time.monotonic(), flush=True)
"""

_WRITER = """
import sys
for _ in sys.stdin:
    try:
        with open("/tmp/cache-file", "ab") as file:
            file.write(bytes(2**16))
        print("written", flush=True)
    except OSError as error:
        print(error.strerror, flush=True)
"""

_GROWING = """
import sys
taken = [b"1" * 2**20 for _ in range(300)]
for _ in sys.stdin:
    print("here", flush=True)
"""


@pytest.fixture
def node(request: pytest.FixtureRequest) -> Iterator[Node]:
    """With the tool for one kind; skips where the machine has it not."""
    kind: Kind = request.param
    with node_for([kind], CONFIG) as made:
        if kind in made.lacking:
            pytest.skip(made.lacking[kind])
        yield made


class Child:
    """A process that answers each line with one."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process = process
        self._input: IO[str] = process.stdin
        self._output: IO[str] = process.stdout

    def says(self) -> str:
        self._input.write("\n")
        self._input.flush()
        return self._output.readline().strip()


@contextmanager
def running(node: Node, program: str) -> Iterator[Child]:
    def plain(folder: Path, config: Path) -> Launch:
        return Launch(command=(sys.executable, "-c", program), port=0)

    launch = node.launcher(plain)(Path(), CONFIG)
    with subprocess.Popen(
        launch.command,
        env=dict(launch.environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Child(process)
        process.kill()


@pytest.mark.parametrize("node", [Kind.CLOCK_JUMP], indirect=True)
def test_the_time_of_day_steps_and_the_monotonic_clock_does_not(node: Node) -> None:
    assert node.clock is not None

    def ahead(child: Child) -> tuple[int, int]:
        day_s, monotonic_s = map(float, child.says().split())
        steps = (day_s - time.time()) / JUMP_S, (monotonic_s - time.monotonic()) / JUMP_S
        return round(steps[0]), round(steps[1])

    with running(node, _CLOCKS) as child:
        assert ahead(child) == (0, 0)
        node.clock.step(JUMP_S)
        assert ahead(child) == (1, 0)
        node.clock.step(0)
        assert ahead(child) == (0, 0)


@pytest.mark.parametrize("node", [Kind.DISK_FULL], indirect=True)
def test_a_full_disk_takes_nothing_until_it_is_empty(node: Node) -> None:
    assert node.disk is not None
    with running(node, _WRITER) as child:
        assert child.says() == "written"
        node.disk.fill(child.process.pid)
        assert child.says() == "No space left on device"
        node.disk.empty(child.process.pid)
        assert child.says() == "written"
    assert not Path("/tmp/cache-file").exists()


@pytest.mark.parametrize("node", [Kind.MEMORY_PRESSURE], indirect=True)
def test_the_kernel_ends_who_has_most(node: Node) -> None:
    assert node.memory is not None
    with running(node, _GROWING) as child:
        assert child.says() == "here"
        pressure = node.memory.press([child.process.pid])
        child.process.wait(60)
        assert pressure.is_over
        pressure.lift()
        assert child.process.returncode == -9


def test_what_is_lacking_is_said() -> None:
    with node_for([Kind.DISK_FULL], Path("/tmp/chaos.yaml")) as node:
        assert node.disk is None
        assert node.lacking == {
            Kind.DISK_FULL: "the config lies in /tmp, where the cluster has another disk"
        }


def test_only_what_is_asked_for_is_made() -> None:
    with node_for([Kind.KILL_ENGINE], CONFIG) as node:
        assert node == Node(lacking={})
