"""vLLM's engine arguments: what the config says over what this project decides.

Routers need them as well, for vLLM's front end. So what runs in the engine's processes only, and
imports vLLM's scheduler and model runner, is named here and not imported.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter
from vllm import AsyncEngineArgs
from vllm.config.quantization import QuantizationConfigArgs
from vllm.platforms import current_platform

CPU_WORKER = "engine.cpu_worker.CPUWorker"
INLINE_EXECUTOR = "engine.executor.InlineExecutor"
WORKER_EXTENSION = "engine.worker.WorkerExtension"


def engine_args(
    model: str, options: Mapping[str, Any], *, kind: type[AsyncEngineArgs] = AsyncEngineArgs
) -> AsyncEngineArgs:
    """vLLM's engine arguments for a model, with what this project decides where nobody else did."""
    defaults: dict[str, Any] = {"worker_extension_cls": WORKER_EXTENSION}
    if current_platform.is_cpu():
        # Compilation costs minutes of start on a CPU and gains little on models that fit one.
        defaults["enforce_eager"] = True
        defaults["worker_cls"] = CPU_WORKER
        single_rank = options.get("tensor_parallel_size", 1) == 1
        if single_rank and options.get("pipeline_parallel_size", 1) == 1:
            defaults["distributed_executor_backend"] = INLINE_EXECUTOR
    types = option_types()
    built = {name: _as_config(value, types.get(name)) for name, value in options.items()}
    return kind(model=model, **(defaults | built))


def option_types() -> Mapping[str, Any]:
    """The engine arguments that vLLM has, by name, with their annotated types."""
    # The one annotation that vLLM imports for type checkers only.
    names = {"QuantizationConfigArgs": QuantizationConfigArgs}
    hints = typing.get_type_hints(AsyncEngineArgs, localns=names)
    fields = [field.name for field in dataclasses.fields(AsyncEngineArgs)]
    return {name: hints[name] for name in fields if not name.startswith("_")}


def _as_config(value: Any, hint: Any) -> Any:
    """A mapping as the config object that vLLM wants for this argument; anything else as it is.

    vLLM makes some of these objects itself, and changes fields of others before it does.
    """
    takes_object = any(dataclasses.is_dataclass(part) for part in (hint, *typing.get_args(hint)))
    if not takes_object or not isinstance(value, Mapping):
        return value
    adapter: TypeAdapter[Any] = TypeAdapter(hint)
    return adapter.validate_python(dict(value))
