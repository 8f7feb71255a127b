"""The router's end of the sandbox: starts the zygote, sends it jobs, replaces it when it ends."""

import asyncio
import itertools
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from router.errors import SandboxUnavailable
from router.sandbox.limits import TaskLimits
from router.sandbox.wire import HEAD, Ended, Job, frame, parse

logger = logging.getLogger(__name__)

RESTART_S = 1.0
"""Between a zygote's end and the start of the next."""

FAILED_START_S = 30.0
"""The same where it has ended before it was ready: its imports take seconds of CPU time."""

START_S = 120.0
"""How long a job waits for a zygote. On a busy machine its imports take that long."""

NUM_TRIES = 2
"""A job is not what ends a zygote: one that was lost with it is given to the next."""


def zygote_arguments(model: str, options: Mapping[str, Any]) -> Sequence[str]:
    """For a zygote that knows the model's tokenizer and its engines' options."""
    return ("-m", "router.sandbox.zygote", model, json.dumps(dict(options)))


class SandboxProcess:
    """Owns the zygote. To be used in one event loop."""

    def __init__(self, arguments: Sequence[str]) -> None:
        """`arguments` are those of the Python process that becomes the zygote."""
        self._arguments = tuple(arguments)
        self._ids = itertools.count()
        self._running: dict[int, asyncio.Future[Ended]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._is_ready = asyncio.Event()
        self._was_ready = False
        self._keeper: asyncio.Task[None] | None = None
        self.pid: int | None = None

    def start(self) -> None:
        """Begins to start the zygote, which takes seconds; jobs may be given at once."""
        self._keeper = asyncio.create_task(self._keep())

    async def close(self) -> None:
        """Ends the zygote and all that it runs."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])

    async def run(self, task: str, payload: bytes, limits: TaskLimits) -> Ended:
        """Runs a task in a child of its own.

        Raises:
            SandboxUnavailable: no child could be started.
        """
        for _ in range(NUM_TRIES):
            try:
                async with asyncio.timeout(START_S):
                    await self._is_ready.wait()
            except TimeoutError:
                break
            ended = await self._run_once(limits.job(next(self._ids), task, payload))
            if ended is not None and ended.was_started:
                return ended
        raise SandboxUnavailable

    async def _run_once(self, job: Job) -> Ended | None:
        """None: the zygote has ended."""
        ended: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        self._running[job.job_id] = ended
        try:
            assert self._writer is not None
            self._writer.write(frame(job))
            return await ended
        except ConnectionError:
            return None
        finally:
            del self._running[job.job_id]

    async def _keep(self) -> None:
        while True:
            try:
                await self._live()
            except Exception:
                logger.exception("the process that checks grammars and templates failed")
            logger.warning("the process that checks grammars and templates has ended: another one")
            await asyncio.sleep(RESTART_S if self._was_ready else FAILED_START_S)

    async def _live(self) -> None:
        """Starts a zygote and serves it until it ends."""
        self._was_ready = False
        ours, theirs = socket.socketpair()
        with theirs:
            process = self._spawn(theirs)
        self.pid = process.pid
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        self._writer = writer
        try:
            await self._read(reader)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._is_ready.clear()
            for ended in self._running.values():
                if not ended.done():
                    ended.set_exception(ConnectionResetError())
            writer.close()
            process.kill()
            # It has been killed: this takes no time.
            process.wait()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while True:
            (length,) = HEAD.unpack(await reader.readexactly(HEAD.size))
            if not length:
                self._was_ready = True
                self._is_ready.set()
                continue
            ended = parse(await reader.readexactly(length), Ended)
            waiting = self._running.get(ended.job_id)
            if waiting is not None and not waiting.done():
                waiting.set_result(ended)

    def _spawn(self, connection: socket.socket) -> subprocess.Popen[bytes]:
        # The router may have been started with a path of its own, by Ray or by tests.
        path = os.pathsep.join(entry for entry in sys.path if entry)
        fd = connection.fileno()
        return subprocess.Popen(
            [sys.executable, *self._arguments, str(fd)],
            pass_fds=[fd],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            # A Ctrl-C in the terminal ends the router, and with it this.
            start_new_session=True,
        )
