"""The processes of one foreground command, all of which end with it.

Owns the command's signals and everything that it starts, directly or through others: as the
subreaper of its descendants it inherits those whose parents have died, so that none gets lost.
Never touches a process that is not its descendant.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType

import psutil

_PR_SET_CHILD_SUBREAPER = 36
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class ProcessTree:
    """A context manager; owns all descendants of this process, and ends them on leaving.

    Inside, SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt once. Those that come later, while
    the descendants are given their time to end, cut that time short.
    """

    def __init__(self, *, log: Path, grace_s: float) -> None:
        self._log = log
        self._grace_s = grace_s
        self._stopping = False
        self._impatient = False

    def __enter__(self) -> "ProcessTree":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
        for number in _STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping = True  # from here on a signal raises nothing
        self._end_all()

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> "Child":
        """Starts a command that writes to the log, out of reach of the terminal's Ctrl-C."""
        with self._log.open("ab") as log:
            process = psutil.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Child(process)

    def inherited(self, name: str) -> "Child":
        """The process of that name whose parent has ended."""
        (process,) = (each for each in psutil.Process().children() if each.name() == name)
        return Child(process)

    def reap_orphans(self, *, known: Sequence["Child"]) -> None:
        """Collects inherited processes that have ended; the known are collected by waiting."""
        pids = {child.pid for child in known}
        for process in psutil.Process().children():
            if process.pid not in pids and process.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(process.pid, os.WNOHANG)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stopping:
            self._impatient = True
            return
        self._stopping = True
        raise KeyboardInterrupt

    def _end_all(self) -> None:
        deadline_s = time.monotonic() + self._grace_s
        asked: set[psutil.Process] = set()
        # A process may start another while it ends, hence again until none is left. The short
        # waits are also what collects the ended ones.
        while processes := psutil.Process().children(recursive=True):
            force = self._impatient or time.monotonic() > deadline_s
            for process in processes:
                if force:
                    _send(process, signal.SIGKILL)
                elif process not in asked:
                    _send(process, signal.SIGTERM)
            asked.update(processes)
            psutil.wait_procs(processes, timeout=0.1)


class Child:
    """A child process whose end can be waited for without polling."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self.pid = process.pid
        self.name = process.name()
        self.pidfd = os.pidfd_open(process.pid)

    def wait(self) -> int | None:
        """The exit status, negative if a signal ended it."""
        first_ended([self])
        return self._process.wait()


def first_ended(children: Sequence[Child], *, timeout_s: float | None = None) -> Child | None:
    """One that has ended, or None if all still run after `timeout_s`."""
    ended = select.poll()
    for child in children:
        ended.register(child.pidfd, select.POLLIN)
    events = ended.poll(None if timeout_s is None else timeout_s * 1000)
    return next((child for child in children if events and child.pidfd == events[0][0]), None)


def _send(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
