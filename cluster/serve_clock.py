"""The clock by which Serve's controller looks after replicas and proxies: no step of the time of
day moves it.

Serve notes by the time of day when it last asked a replica how it is, and when one that leaves has
to be gone. After a step back it would ask nobody until the old time comes again, and what dies
meanwhile would not be replaced. Owns nothing; changes what Serve calls in the controller's process.
"""

import time
from types import ModuleType

CALLBACK_VARIABLE = "RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH"
CALLBACK = "cluster.serve_clock:keep_steady"
"""What the controller is to call as it starts."""


class SteadyTime(ModuleType):
    """The module `time`, whose time of day goes on from now by the monotonic clock."""

    def __init__(self) -> None:
        super().__init__("time")
        self._ahead_s = time.time() - time.monotonic()

    def time(self) -> float:
        return self._ahead_s + time.monotonic()

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)


def keep_steady() -> None:
    """To be called in the controller's process, before it looks after anything."""
    # Here: importing Serve takes a second, which `pdserve up` does not wait for.
    from ray._common.utils import Timer
    from ray.serve._private import deployment_state

    steady = SteadyTime()
    deployment_state.time = steady
    Timer.time = lambda self: steady.time()
