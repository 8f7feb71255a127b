"""No pause between a request's KV having arrived and its first step.

vLLM's engine sleeps for a millisecond after every step that ran no model, so that transfers can
make progress. Where that very step has seen a transfer end, the sleep is time between a client's
first token and its second. Owns vLLM's sleep in the engine core's process.
"""

import time
from collections.abc import Callable
from typing import Any

from vllm.v1.engine import core


class _Clock:
    """Stands where vLLM's engine core looks for the module `time`; sleeps only if `idle`."""

    def __init__(self, idle: Callable[[], bool]) -> None:
        self._idle = idle

    def sleep(self, seconds: float) -> None:
        if self._idle():
            time.sleep(seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def sleep_only_if(idle: Callable[[], bool]) -> None:
    """To be called in the engine core's process, by whoever knows whether a step is due."""
    core.time = _Clock(idle)
