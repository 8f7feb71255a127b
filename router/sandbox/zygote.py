"""The zygote: forks a child for each job that the router sends, and tells how it ended.

Run as `python -m router.sandbox.zygote MODEL OPTIONS FD`. It ends when its connection does, and all
children with it. It never has a second thread: a fork would not carry it, nor the locks it holds.
"""

import gc
import json
import os
import resource
import selectors
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from router.sandbox.child import Task, run_child
from router.sandbox.wire import HEAD, MAX_OUTPUT_BYTES, Ended, Job, frame, parse

STACK_BYTES = 1024 * 1024
"""Of every thread here. Those of an engine have 8 MiB by default, and 2 MiB where the system sets
no limit: what does not overflow here does not overflow there."""

NICENESS = 5
"""Answers that are being written come before schemas that nobody has seen yet."""

ENVIRONMENT = {
    # A library's pool of threads would not survive the fork.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Address space that an allocator sets aside for each thread is not memory in use.
    "MALLOC_ARENA_MAX": "2",
    "RUST_BACKTRACE": "0",
}


@dataclass(slots=True)
class _Child:
    job: Job
    pid: int
    deadline_s: float
    output: bytearray = field(default_factory=bytearray)
    was_killed: bool = False

    def kill(self) -> None:
        self.was_killed = True
        os.kill(self.pid, signal.SIGKILL)


class Zygote:
    """Owns the children that run, by the pipe that each answers on."""

    def __init__(self, connection: socket.socket, tasks: Mapping[str, Task]) -> None:
        self._connection = connection
        self._tasks = tasks
        self._children: dict[int, _Child] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(connection, selectors.EVENT_READ)

    def run(self) -> None:
        """Returns when the router is gone; its children are killed then."""
        while True:
            for key, _ in self._selector.select(self._patience_s()):
                if key.fileobj is not self._connection:
                    self._read(key.fd)
                elif (job := self._receive()) is None:
                    return
                else:
                    self._fork(job)
            for child in self._children.values():
                if time.monotonic() >= child.deadline_s and not child.was_killed:
                    child.kill()

    def kill_all(self) -> None:
        for child in self._children.values():
            child.kill()

    def _patience_s(self) -> float | None:
        if not self._children:
            return None
        first_s = min(child.deadline_s for child in self._children.values())
        return max(0.0, first_s - time.monotonic()) + 0.01

    def _receive(self) -> Job | None:
        head = self._receive_exactly(HEAD.size)
        body = head and self._receive_exactly(*HEAD.unpack(head))
        return parse(body, Job) if body else None

    def _receive_exactly(self, num_bytes: int) -> bytes | None:
        parts = bytearray()
        while len(parts) < num_bytes:
            part = self._connection.recv(num_bytes - len(parts))
            if not part:
                return None
            parts += part
        return bytes(parts)

    def _fork(self, job: Job) -> None:
        ours, theirs = os.pipe()
        try:
            pid = os.fork()
        except OSError:
            os.close(ours)
            os.close(theirs)
            self._tell(Ended(job_id=job.job_id, exit_code=0, output=b"", was_started=False))
            return
        if pid == 0:
            # Whoever holds this end would keep the router's connection open.
            self._connection.close()
            run_child(job, self._tasks, theirs)
        os.close(theirs)
        self._children[ours] = _Child(job, pid, time.monotonic() + job.wall_s)
        self._selector.register(ours, selectors.EVENT_READ)

    def _read(self, fd: int) -> None:
        child = self._children[fd]
        part = os.read(fd, 1024 * 1024)
        child.output += part
        if len(child.output) > 2 * MAX_OUTPUT_BYTES:
            child.kill()  # it does not keep to what it was told
        if part:
            return
        self._selector.unregister(fd)
        os.close(fd)
        del self._children[fd]
        _, status = os.waitpid(child.pid, 0)
        self._tell(
            Ended(
                job_id=child.job.job_id,
                exit_code=os.waitstatus_to_exitcode(status),
                output=bytes(child.output),
                was_killed=child.was_killed,
            )
        )

    def _tell(self, ended: Ended) -> None:
        self._connection.sendall(frame(ended))


def main() -> None:
    if resource.getrlimit(resource.RLIMIT_STACK)[0] != STACK_BYTES:
        # The C library takes the size of its threads' stacks from the limit at a process's start.
        hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
        resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, hard))
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **ENVIRONMENT})
    from router.sandbox.tasks import prepare

    tasks = prepare(sys.argv[1], json.loads(sys.argv[2]))
    os.nice(NICENESS)
    # So that a child's garbage collector does not copy the pages that it shares with this process.
    gc.collect()
    gc.freeze()
    serve(int(sys.argv[3]), tasks)


def serve(fd: int, tasks: Mapping[str, Task]) -> None:
    """Says that it is ready, and forks until the router is gone."""
    connection = socket.socket(fileno=fd)
    zygote = Zygote(connection, tasks)
    try:
        connection.sendall(HEAD.pack(0))
        zygote.run()
    except OSError:
        pass  # the router is gone
    finally:
        zygote.kill_all()


if __name__ == "__main__":
    main()
