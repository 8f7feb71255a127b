"""A small process that outlives its parent by moments and takes what that has started with it.

Engine cores and their workers survive a killed parent and keep its memory, ports and cores; so does
a Ray cluster whose command is killed. The parent (a replica, `pdserve up`) starts this script first
and marks its environment; every process it starts later inherits the mark. When it is gone, however
it died, whatever carries the mark is killed. It needs no cooperation from the engine, so a hanging,
stopped or still importing one goes as well. One who has the mark may set another: a replica of
`pdserve up` does, and its own guardian ends its engine.

Run as `python guardian.py PARENT_PID MARK`; it imports nothing but the standard library.
"""

import contextlib
import os
import select
import signal
import sys
import time
import uuid
from pathlib import Path

MARK_VARIABLE = "PDSERVE_REPLICA"
SETTLE_S = 3.0
"""How long after the replica's death to look for late children (a fork in flight, say)."""


def start_guardian() -> None:
    """Marks this process's environment and starts the guardian of all its later children."""
    mark = uuid.uuid4().hex
    os.environ[MARK_VARIABLE] = mark
    # Or setproctitle, with which vLLM names its processes, writes over the environment they show.
    os.environ["SPT_NOENV"] = "1"
    arguments = [sys.executable, "-I", "-S", __file__, str(os.getpid()), mark]
    silent = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
    # Not marked itself, and in a session of its own: a Ctrl-C in the terminal that ends the
    # replica must not end its guardian first.
    os.posix_spawn(sys.executable, arguments, {}, file_actions=silent, setsid=True)


def marked_pids(mark: str) -> list[int]:
    """The processes whose environment carries the mark. Those of other users are not seen."""
    needle = f"{MARK_VARIABLE}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:  # ended meanwhile, or not ours to look at
            continue
        if needle in environment.split(b"\0"):
            found.append(int(entry.name))
    return found


def kill_marked(mark: str) -> None:
    """Kills what carries the mark until nothing new has appeared for a while."""
    deadline_s = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline_s:
        for pid in marked_pids(mark):
            _kill(pid)
        time.sleep(0.1)


def kill_children() -> None:
    """Kills what this process has started, as far as it is there now.

    Not multiprocessing's resource tracker: it is this process's too, and tidies up after the rest.
    """
    for pid in marked_pids(os.environ[MARK_VARIABLE]):
        with contextlib.suppress(OSError):  # ended meanwhile
            if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                _kill(pid)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def main() -> None:
    parent_pid, mark = int(sys.argv[1]), sys.argv[2]
    try:
        parent = os.pidfd_open(parent_pid)
    except ProcessLookupError:
        parent = None
    if parent is not None and os.getppid() == parent_pid:
        poll = select.poll()
        poll.register(parent, select.POLLIN)
        poll.poll()
    kill_marked(mark)


if __name__ == "__main__":
    main()
