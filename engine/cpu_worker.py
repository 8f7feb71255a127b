"""vLLM's worker on CPUs, with the permissions that its kernels need.

Named by its path in `worker_cls` (`engine.arguments`); imported in the processes that run the model
and nowhere else.
"""

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker as VllmCPUWorker

from engine.amx import request_amx


class CPUWorker(VllmCPUWorker):  # type: ignore[misc]
    """One rank on a CPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        request_amx()
        super().__init__(*args, **kwargs)
