"""Ends what `pdserve up` has started where that was killed and could not do it itself.

Run as `python -m cluster.reaper FOLDER PID`, beside the command with that process id. Owns nothing
while that lives, which ends it with everything else. What it ends knows the folder by a variable of
its environment.
"""

import contextlib
import os
import select
import shutil
import sys
from collections.abc import Iterator, Mapping

import psutil

_VARIABLE = "PDSERVE_UP_FOLDER"


def mark(folder: str) -> Mapping[str, str]:
    """Environment variables by which a process, and all that it starts, are known."""
    return {_VARIABLE: folder}


def command(folder: str) -> list[str]:
    """The reaper for the process that calls this."""
    return [sys.executable, "-m", "cluster.reaper", folder, str(os.getpid())]


def marked(folder: str) -> Iterator[psutil.Process]:
    """The processes that have the mark."""
    for process in psutil.process_iter():
        # Others' processes may not be looked at, and are none of ours.
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(_VARIABLE) == folder and process.pid != os.getpid():
                yield process


def main() -> None:
    """Returns when nothing is left."""
    folder, pid = sys.argv[1], int(sys.argv[2])
    _await_end(pid)
    # A process may start another while it ends, hence again until none is left.
    while processes := [each for each in marked(folder) if each.is_running()]:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=0.1)
    shutil.rmtree(folder, ignore_errors=True)


def _await_end(parent_pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        parent = os.pidfd_open(parent_pid)
        if os.getppid() == parent_pid:  # else it has ended already
            select.select([parent], [], [])


if __name__ == "__main__":
    main()
