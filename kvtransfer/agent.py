"""NIXL's agent, as this package wants it: one that waits, and that tells nobody what it has read.

Owns how NIXL's agent is built and wrapped, and UCX's settings beneath it. Never starts a transfer.

NIXL's Python wrapper hard-codes a progress delay of zero, with which the progress thread of every
worker polls for ever and uses a whole core. From one microsecond up the thread waits on the
transports' file descriptors instead, and the delay is only how often it looks without being told.
"""

import os
import sys
from typing import Any

CPU_PROGRESS_DELAY_US = 10_000
"""Idle cost of a process, measured: 1 ms 2 % of a core, 10 ms 0.5 %. On GPUs, which leave cores to
spare, NIXL's own zero stays unless another is asked for: what it costs there nobody has measured.
"""


CPU_UCX_SETTINGS = {
    # The thread that asks for a transfer and the progress thread share one lock. By default they
    # spin for it: on cores that others use as well, the one that copies is put aside for the one
    # that spins, and half the bandwidth is lost.
    "UCX_USE_MT_MUTEX": "y",
    # Pieces that are copied before the lock is given back; 8 by default.
    "UCX_CMA_TX_QUOTA": "64",
}
"""For transfers between processes of one host, where the CPU does the copying.

Measured on two cores with other work on them, 256 MiB in pieces of 1 MiB by what process_vm_readv
gets: 0.5 to 0.7 with UCX's own settings, 0.96 and more with these.
"""


def replace_spinning_agent(
    wrapper: Any, device_type: str, progress_delay_us: int | None = None
) -> None:
    """Give NIXL's `nixl_agent` wrapper a new agent of the same name and backends that waits.

    To be called before anything is registered: the old agent is destroyed. It stays where the delay
    is NIXL's own, zero, as it is for GPUs unless `progress_delay_us` says otherwise. For CPUs this
    also sets CPU_UCX_SETTINGS in this process's environment, from where UCX takes them, but for
    those that are set already.
    """
    if progress_delay_us is None:
        progress_delay_us = CPU_PROGRESS_DELAY_US if device_type == "cpu" else 0
    if device_type == "cpu":
        for name, setting in CPU_UCX_SETTINGS.items():
            os.environ.setdefault(name, setting)
    if not progress_delay_us:
        return
    # The wrapper's module belongs to the CUDA 12 or the CUDA 13 build; its bindings are the ones.
    bindings = sys.modules[type(wrapper).__module__].nixlBind
    config = bindings.nixlAgentConfig()
    config.useProgThread = True
    config.useListenThread = False
    config.syncMode = bindings.NIXL_THREAD_SYNC_NONE
    config.captureTelemetry = True  # The only source of bytes and seconds of a transfer.
    config.pthrDelay = progress_delay_us
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
