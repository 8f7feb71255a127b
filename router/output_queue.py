"""What engines have computed, on its way to vLLM's front end.

Owns the queue that the front end reads.
"""

import asyncio
import time
from collections.abc import Iterable

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs


class OutputQueue:
    """Batches of outputs, in order."""

    def __init__(self) -> None:
        self._batches: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        self._read_s = time.monotonic()
        """When outputs were last asked for, or put where there were none."""

    def put(self, outputs: Iterable[EngineCoreOutput]) -> None:
        """Adds a batch, unless there is nothing in it."""
        batch = list(outputs)
        if not batch:
            return
        if self._batches.empty():
            self._read_s = time.monotonic()
        self._batches.put_nowait(
            EngineCoreOutputs(
                outputs=batch,
                timestamp=time.monotonic(),
                # Of engines whose weights were never changed, as with one plain server.
                weight_version="default",
            )
        )

    async def get(self) -> EngineCoreOutputs:
        """The next batch, once there is one."""
        self._read_s = time.monotonic()
        return await self._batches.get()

    def unread_s(self) -> float:
        """For how long outputs have waited for the front end to ask for them."""
        return 0.0 if self._batches.empty() else time.monotonic() - self._read_s
