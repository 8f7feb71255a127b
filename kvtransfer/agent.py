"""NIXL's agent, as this package wants it: one that waits, and that tells nobody what it has read.

Owns how NIXL's agent is built and wrapped. Never starts a transfer.

NIXL's Python wrapper hard-codes a progress delay of zero, with which the progress thread of every
worker polls for ever and uses a whole core. From one microsecond up the thread waits on the
transports' file descriptors instead, and the delay is only how often it looks without being told.
"""

import sys
from typing import Any

PROGRESS_DELAY_US = 10_000
"""Idle cost of a process, measured: 1 ms 2 % of a core, 10 ms 0.5 %."""


def replace_spinning_agent(wrapper: Any) -> None:
    """Give NIXL's `nixl_agent` wrapper a new agent of the same name and backends that waits.

    To be called before anything is registered: the old agent is destroyed.
    """
    # The wrapper's module belongs to the CUDA 12 or the CUDA 13 build; its bindings are the ones.
    bindings = sys.modules[type(wrapper).__module__].nixlBind
    config = bindings.nixlAgentConfig()
    config.useProgThread = True
    config.useListenThread = False
    config.syncMode = bindings.NIXL_THREAD_SYNC_NONE
    config.captureTelemetry = True  # The only source of bytes and seconds of a transfer.
    config.pthrDelay = PROGRESS_DELAY_US
    backend_params = dict(wrapper.backend_options)
    wrapper.agent = bindings.nixlAgent(wrapper.name, config)
    for name, params in backend_params.items():
        wrapper.create_backend(name, params)


class SilentReads:
    """NIXL's `nixl_agent` wrapper, without the notification at the end of a prepared transfer.

    Whoever starts one tells the peer himself, when he needs nothing of it any more.
    """

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapper, name)

    def make_prepped_xfer(self, *sides: Any, notif_msg: bytes = b"", **options: Any) -> Any:
        """As the wrapper's; `notif_msg` is dropped."""
        return self._wrapper.make_prepped_xfer(*sides, **options)
