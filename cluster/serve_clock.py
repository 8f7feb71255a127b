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

    def of_day(self, day_s: float) -> float:
        """What this clock shows when the time of day is `day_s`."""
        return day_s + self.time() - time.time()

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)


def keep_steady() -> None:
    """To be called in the controller's process, before it looks after anything."""
    # Here: importing Serve takes a second, which `pdserve up` does not wait for.
    from ray._common.utils import Timer
    from ray.serve._private import deployment_state
    from ray.serve._private.cluster_node_info_cache import ClusterNodeInfoCache

    steady = SteadyTime()
    deployment_state.time = steady
    Timer.time = lambda self: steady.time()
    draining_nodes = ClusterNodeInfoCache.get_draining_nodes

    def steady_draining_nodes(self: ClusterNodeInfoCache) -> dict[str, int]:
        """When they end, which the autoscaler says by the time of day, in ms."""
        return {
            node_id: round(1000 * steady.of_day(ends_ms / 1000))
            for node_id, ends_ms in draining_nodes(self).items()
        }

    ClusterNodeInfoCache.get_draining_nodes = steady_draining_nodes
