"""Processes that begin with vLLM imported: most of an engine's start is Python's imports.

The server they are forked from has imported it, and has run nothing of it. What else tells a
spawned process from them, its environment, is handed over. Hosts spawn theirs: see tests/engine.
"""

import os
from multiprocessing.context import ForkServerContext, ForkServerProcess

IMPORTED = ["vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "kvtransfer.extension"]
"""Not NIXL: it loads UCX, which looks at the environment."""


class ForkedProcess(ForkServerProcess):
    """Runs in the environment of who starts it, as it is then. Owns a copy of it."""

    def start(self) -> None:
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        super().run()


class ForkedContext(ForkServerContext):
    """What vLLM asks for its processes. They share one server, which ends with this process."""

    Process = ForkedProcess


def forked_context() -> ForkedContext:
    """In place of vLLM's `get_mp_context`."""
    context = ForkedContext()
    context.set_forkserver_preload(IMPORTED)
    return context
