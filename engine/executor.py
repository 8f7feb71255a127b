"""Runs the model inside the engine core's own process.

vLLM's CPU platform replaces its single-process executor by the multi-process one, because only
there does it bind OpenMP threads. With one rank and no binding that buys a second process and a
shared-memory queue that spins on `sched_yield` for a second after every step; on few cores the spin
costs more than the model. Named by its path in `distributed_executor_backend`, this class is taken
as it is (`engine.arguments`).
"""

from vllm.v1.executor.uniproc_executor import UniProcExecutor


class InlineExecutor(UniProcExecutor):  # type: ignore[misc]
    """One rank, in the engine core's process: no queue between scheduler and model."""
