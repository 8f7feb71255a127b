"""In what order tasks run: many that take long hold up none that does not, nor any other client."""

from router.clients import CLIENT
from router.sandbox.limits import TaskLimits, Work, overran, result_of
from router.sandbox.process import SandboxProcess
from router.sandbox.turns import Turns

NUM_QUICK = 2
QUICK_S = 0.5
"""CPU seconds of a first try. Nearly every schema takes a hundredth of it."""

NUM_SLOW = 1
MAX_QUICK_WAITING = 256
MAX_SLOW_WAITING = 16


class Sandbox:
    """Runs tasks, at most `NUM_QUICK` + `NUM_SLOW` at once. Owns the two queues.

    A task that overruns a first, short limit begins again in the other queue with its whole limit.
    """

    def __init__(self, process: SandboxProcess, limits: TaskLimits) -> None:
        self._process = process
        self._limits = limits
        self._quick = Turns(NUM_QUICK, MAX_QUICK_WAITING)
        self._slow = Turns(NUM_SLOW, MAX_SLOW_WAITING)

    async def run(self, work: Work, payload: bytes) -> bytes:
        """What the task has found; both are JSON.

        Raises:
            TaskRefused: it failed, or took more than it may.
            SandboxUnavailable: it could not be run; it may be tried again.
        """
        quick, client = self._limits.within(QUICK_S), CLIENT.get()
        async with self._quick.turn(client):
            ended = await self._process.run(work.task, payload, quick)
        if overran(ended) and quick.cpu_s < self._limits.cpu_s:
            async with self._slow.turn(client):
                ended = await self._process.run(work.task, payload, self._limits)
        return result_of(ended, work, self._limits)
