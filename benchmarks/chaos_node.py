"""Faults of the node under a cluster: its clock steps, its disk is full, its memory is used up.

Each is of the cluster's processes alone, and nothing else on the machine sees it: a preloaded
library shifts their time of day, a mount namespace gives them a small /tmp with logs and caches in
it, a memory cgroup lets one replica have no more. Owns what that takes, and what is lacking for it.
"""

import itertools
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from benchmarks.chaos_faults import Kind
from benchmarks.systems import Launch, Launcher

JUMP_S = 3600
DISK_BYTES = 256 * 2**20
_MEMORY_BYTES = 16 * 2**20
"""What a replica under memory pressure may have more than it has."""
_OOM_TIMEOUT_S = 30.0
_POLL_S = 0.05
_SOURCE = Path(__file__).with_name("chaos_clock.c")
_CGROUPS = Path("/sys/fs/cgroup")
_Tool = TypeVar("_Tool")
_BALLAST = f"""
taken = [b"1" * 2**20 for _ in range({2 * _MEMORY_BYTES // 2**20})]
input()
"""


class LackingError(RuntimeError):
    """This machine, or this user, cannot do a fault; the text says what is lacking."""


class Clock:
    """The time of day of all processes that are started with `environment`."""

    def __init__(self, folder: Path) -> None:
        self._offset, library = folder / "offset", folder / "clock.so"
        if not _works("cc", "-shared", "-fPIC", "-O2", "-o", library, _SOURCE, "-ldl", "-pthread"):
            raise LackingError("there is no C compiler, cc, that works")
        self.environment = {"LD_PRELOAD": str(library), "CHAOS_CLOCK": str(self._offset)}
        self.step(JUMP_S)
        ahead_s = float(self._run("import time; print(time.time())")) - time.time()
        if not 0.9 * JUMP_S < ahead_s < 1.1 * JUMP_S:
            raise LackingError("no library can be preloaded")
        self.step(0)

    def step(self, to_s: int) -> None:
        """Sets it so many seconds ahead of the machine's, at once."""
        # In place: the processes have the file mapped.
        with self._offset.open("r+b" if self._offset.exists() else "wb") as file:
            file.write(struct.pack("=q", to_s))

    def _run(self, program: str) -> bytes:
        environment = {**os.environ, **self.environment}
        return subprocess.check_output([sys.executable, "-c", program], env=environment)


class Disk:
    """A small /tmp, with the log and cache folders in it, for one process and its descendants."""

    environment: Mapping[str, str] = {"XDG_CACHE_HOME": "/tmp/cache"}

    def __init__(self) -> None:
        if not _works(*self._command(), "true"):
            raise LackingError("it takes the right to mount")

    def launch(self, command: tuple[str, ...]) -> tuple[str, ...]:
        """The command that runs `command` on it."""
        return (*self._command(), *command)

    def fill(self, pid: int) -> None:
        """Leaves no byte to a process that runs on it."""
        with suppress(OSError), _ballast_file(pid).open("wb", buffering=0) as file:
            while True:
                file.write(bytes(2**16))

    def empty(self, pid: int) -> None:
        """Takes what `fill` has written away."""
        _ballast_file(pid).unlink(missing_ok=True)

    def _command(self) -> tuple[str, ...]:
        mount = f'mount -t tmpfs -o size={DISK_BYTES} chaos /tmp && exec "$@"'
        return ("unshare", "--mount", "sh", "-c", mount, "sh")


class Memory:
    """Memory cgroups, one for each replica that is let have no more memory."""

    def __init__(self) -> None:
        self._parent, self._limit_name, self._events_name = _memory_cgroup()
        self._numbers = itertools.count()
        try:
            folder = self._make()
            made = (folder / self._limit_name).exists()
            folder.rmdir()
        except OSError as error:
            raise LackingError(f"no memory cgroup can be made: {error.strerror}") from None
        if not made:
            raise LackingError("cgroups here do not limit memory")

    def press(self, pids: Iterable[int]) -> "MemoryPressure":
        """Gives these processes and a ballast together hardly any memory more."""
        return MemoryPressure(self._make(), self._limit_name, self._events_name, pids)

    def close(self) -> None:
        """Removes the cgroups whose processes have ended."""
        for folder in self._parent.glob(f"{self._prefix}*"):
            with suppress(OSError):
                folder.rmdir()

    @property
    def _prefix(self) -> str:
        return f"chaos-{os.getpid()}-"

    def _make(self) -> Path:
        folder = self._parent / f"{self._prefix}{next(self._numbers)}"
        folder.mkdir()
        return folder


class MemoryPressure:
    """One replica's, until `lift`."""

    def __init__(self, folder: Path, limit_name: str, events_name: str, pids: Iterable[int]):
        self._limit, self._events = folder / limit_name, folder / events_name
        self._limit.write_text(str(_MEMORY_BYTES))
        members = folder / "cgroup.procs"
        for pid in pids:
            with suppress(ProcessLookupError):
                members.write_text(str(pid))
        enter = f'echo $$ > {members} && exec "$@"'
        self._ballast = subprocess.Popen(
            ["sh", "-c", enter, "sh", sys.executable, "-c", _BALLAST],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._until_s = time.monotonic() + _OOM_TIMEOUT_S

    @property
    def is_over(self) -> bool:
        """Whether the kernel has ended a process for want of memory, or does not in time."""
        return self._num_ended() > 0 or time.monotonic() > self._until_s

    def lift(self) -> None:
        """Who is left may have what it wants."""
        self._ballast.kill()
        self._ballast.communicate()
        self._limit.write_text("max" if self._limit.name == "memory.max" else "-1")

    def _num_ended(self) -> int:
        lines = (line.split() for line in self._events.read_text().splitlines())
        return next((int(num) for name, num in lines if name == "oom_kill"), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What the faults of the node are done with; `lacking` says why one is None, if it was asked
    for."""

    clock: Clock | None = None
    disk: Disk | None = None
    memory: Memory | None = None
    lacking: Mapping[Kind, str]

    def launcher(self, launch: Launcher) -> Launcher:
        """Starts a system so that its clock and its disk can be got at."""

        def launched(folder: Path, config: Path) -> Launch:
            plain = launch(folder, config.resolve())
            clock = self.clock.environment if self.clock else {}
            disk = self.disk.environment if self.disk else {}
            command = self.disk.launch(plain.command) if self.disk else plain.command
            return replace(
                plain, command=command, environment={**plain.environment, **clock, **disk}
            )

        return launched


@contextmanager
def node_for(kinds: Iterable[Kind], config: Path) -> Iterator[Node]:
    """What those faults of a node need, as far as this machine lets us."""
    lacking: dict[Kind, str] = {}

    def made(kind: Kind, make: Callable[[], _Tool]) -> _Tool | None:
        try:
            return make() if kind in kinds else None
        except LackingError as error:
            lacking[kind] = str(error)
            return None

    with ExitStack() as held:
        # Not in /tmp, in whose place the cluster has another one.
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp")))
        memory = made(Kind.MEMORY_PRESSURE, Memory)
        if memory is not None:
            held.callback(memory.close)
        yield Node(
            clock=made(Kind.CLOCK_JUMP, lambda: Clock(folder)),
            disk=made(Kind.DISK_FULL, lambda: _disk_for(config)),
            memory=memory,
            lacking=lacking,
        )


def _works(program: str, *arguments: str | Path) -> bool:
    if shutil.which(program) is None:
        return False
    return subprocess.run([program, *arguments], capture_output=True).returncode == 0


def _disk_for(config: Path) -> Disk:
    if config.resolve().is_relative_to("/tmp"):
        raise LackingError("the config lies in /tmp, where the cluster has another disk")
    return Disk()


def _ballast_file(pid: int) -> Path:
    return Path(f"/proc/{pid}/root/tmp/ballast")


def _memory_cgroup() -> tuple[Path, str, str]:
    """Where cgroups can be made, and what their limit and their count of ended processes are in."""
    if (_CGROUPS / "cgroup.controllers").exists():
        # A cgroup that has processes may not pass memory's control on; the root may.
        return _CGROUPS, "memory.max", "memory.events"
    lines = (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines())
    own = next((path for _, names, path in lines if "memory" in names.split(",")), "/")
    below_own = _CGROUPS / "memory" / own.lstrip("/")
    parent = below_own if below_own.is_dir() else _CGROUPS / "memory"
    return parent, "memory.limit_in_bytes", "memory.oom_control"
