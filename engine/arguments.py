"""vLLM's engine arguments: what the config says over what this project decides.

Routers need them as well, for vLLM's front end. So what runs in the engine's processes only, and
imports vLLM's scheduler and model runner, is named here and not imported.
"""

from collections.abc import Mapping
from typing import Any

from vllm import AsyncEngineArgs
from vllm.platforms import current_platform

CPU_WORKER = "engine.cpu_worker.CPUWorker"
INLINE_EXECUTOR = "engine.executor.InlineExecutor"
WORKER_EXTENSION = "engine.worker.WorkerExtension"


def engine_args(model: str, options: Mapping[str, Any]) -> AsyncEngineArgs:
    """vLLM's engine arguments for a model, with what this project decides where nobody else did."""
    defaults: dict[str, Any] = {"worker_extension_cls": WORKER_EXTENSION}
    if current_platform.is_cpu():
        # Compilation costs minutes of start on a CPU and gains little on models that fit one.
        defaults["enforce_eager"] = True
        defaults["worker_cls"] = CPU_WORKER
        single_rank = options.get("tensor_parallel_size", 1) == 1
        if single_rank and options.get("pipeline_parallel_size", 1) == 1:
            defaults["distributed_executor_backend"] = INLINE_EXECUTOR
    return AsyncEngineArgs(model=model, **(defaults | dict(options)))
