"""The names inside vLLM, torch and Ray that this package relies on, checked before a start.

Both are pinned exactly (pyproject.toml). Whoever moves a pin reads this list first.
"""

from importlib import import_module

from engine.errors import EngineInternalsChanged

PINS = "vLLM 0.32.0, torch 2.13.0 and Ray 2.60.0"

RELIED_ON = {
    "vllm.v1.engine.core_client:EngineCoreClient": ("make_async_mp_client",),
    "vllm.v1.engine.core_client:AsyncMPClient": (
        "abort_requests_async",
        "add_request_async",
        "collective_rpc_async",
        "get_output_async",
        "is_scheduler_paused_async",
        "shutdown",
    ),
    "vllm.v1.engine:EngineCoreRequest": ("sampling_params", "prompt_token_ids"),
    "vllm.v1.engine:EngineCoreOutput": ("kv_transfer_params", "prefill_stats", "finish_reason"),
    "vllm.v1.engine.utils:CoreEngineProcManager": ("finished_procs",),
    "vllm.v1.serial_utils:MsgpackEncoder": ("encode",),
    "vllm.v1.serial_utils:MsgpackDecoder": ("decode",),
    "vllm.v1.engine.core:time": ("sleep",),
    "vllm.v1.core.sched.scheduler:Scheduler": (
        "_handle_blocked_waiting_request",
        "add_request",
        "make_stats",
        "schedule",
        "shutdown",
        "update_from_output",
    ),
    "vllm.config.scheduler:SchedulerConfig": (
        "long_prefill_token_threshold",
        "long_prefill_token_threshold_adaptive",
    ),
    "vllm.v1.metrics.stats:SchedulerStats": ("ec_connector_stats",),
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler": (),
    "vllm.v1.core.sched.request_queue:SchedulingPolicy": ("PRIORITY",),
    "vllm.v1.core.sched.request_queue:PriorityRequestQueue": ("__iter__",),
    "vllm.v1.request:Request": (
        "__lt__",
        "append_output_token_ids",
        "num_output_tokens",
        "num_tokens",
    ),
    "vllm.v1.request:RequestStatus": ("WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR",),
    "vllm.v1.structured_output:StructuredOutputManager": (
        "_create_grammar",
        "_fill_bitmasks",
        "accept_tokens",
        "grammar_init",
    ),
    "vllm.v1.structured_output.backend_guidance:GuidanceBackend": ("compile_grammar",),
    "vllm.v1.structured_output.backend_lm_format_enforcer:LMFormatEnforcerBackend": (
        "compile_grammar",
    ),
    "vllm.v1.structured_output.backend_outlines:OutlinesBackend": ("compile_grammar",),
    "vllm.v1.structured_output.backend_xgrammar:XgrammarBackend": ("compile_grammar",),
    "vllm.v1.worker.gpu_model_runner:CachedRequestState": ("__post_init__",),
    "vllm.v1.executor.multiproc_executor:MultiprocExecutor": ("shutdown",),
    "vllm.v1.executor.multiproc_executor:WorkerProcHandle": (),
    "vllm.v1.executor.uniproc_executor:UniProcExecutor": ("execute_model",),
    "torch.distributed.rendezvous:_torchelastic_use_agent_store": (),
    "torch:cpu": ("_init_amx", "_is_amx_fp16_supported", "_is_amx_tile_supported"),
    "ray._private:worker": ("raise_sys_exit_with_custom_error_message",),
}


def check_internals() -> None:
    """Raises EngineInternalsChanged, in one line, where vLLM or Ray lacks a name we call."""
    for place, names in RELIED_ON.items():
        module_name, _, class_name = place.partition(":")
        try:
            owner = getattr(import_module(module_name), class_name)
        except (ImportError, AttributeError):
            raise EngineInternalsChanged(f"there is no {place}: pdserve needs {PINS}") from None
        for name in names:
            if not hasattr(owner, name):
                raise EngineInternalsChanged(f"{place} has no {name}: pdserve needs {PINS}")
