"""SIGTERM asks a replica to leave, as it is sent before a spot machine is taken away.

Python sets signal handlers in the main thread only, and nothing of a replica ever runs there: Ray
keeps the main thread of an actor with async methods in its own loop, under a handler that raises
SystemExit. That handler looks up by name the function that raises it
(`ray._private.worker.Worker.main_loop`); the name is what is replaced here. Owns what SIGTERM does
in a replica's process.
"""

import os
import signal
from collections.abc import Callable

from ray._private import worker

RAISES_EXIT = "raise_sys_exit_with_custom_error_message"


class Preemption:
    """Calls `notice`, in the main thread and within about a second, at the first SIGTERM.

    The second one ends the process at once, as any would have before.
    """

    def __init__(self, notice: Callable[[], object]) -> None:
        self._notice = notice
        self._raise_exit: Callable[..., None] = getattr(worker, RAISES_EXIT)
        setattr(worker, RAISES_EXIT, self._noticed)

    def _noticed(self, message: str, exit_code: int = 0) -> None:
        setattr(worker, RAISES_EXIT, self._raise_exit)
        self._notice()

    def exit(self, because: str | None = None) -> None:
        """Ends the process, the way Ray ends it on SIGTERM; Ray shows `because` as the reason."""

        def raise_exit(message: str, exit_code: int = 0) -> None:
            self._raise_exit(because or message, exit_code)

        setattr(worker, RAISES_EXIT, raise_exit)
        os.kill(os.getpid(), signal.SIGTERM)
