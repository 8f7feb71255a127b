"""Engine options of vLLM that a config may not set, and what to set instead.

Owns the list and the reasons. Never imports vLLM.
"""

_OF_NODES = "set nodes of the pool instead"
_NO_DATA_PARALLEL = "raise the pool's replicas instead"
_WHOLE_CONTEXT = "KV moves between ranks that hold all tokens; raise tensor_parallel_size instead"
_GENERATES = "pdserve serves models that generate text"
OWNED_ENGINE_OPTIONS = {
    "model": "set by the top-level model",
    "served_model_name": "set by the top-level served_name",
    "kv_transfer_config": "set from transfer",
    "kv_offloading_size": "the engine's one KV connector is transfer's",
    "kv_offloading_backend": "the engine's one KV connector is transfer's",
    "scheduler_cls": "pdserve's own lets an answer go on in another engine",
    "scheduling_policy": "prefill runs prompts in the order of their latest starts",
    "worker_extension_cls": "taken by pdserve's own",
    "spec_method": "set method in speculative_config instead",
    "spec_model": "set model in speculative_config instead",
    "spec_tokens": "set num_speculative_tokens in speculative_config instead",
    "data_parallel_size": _NO_DATA_PARALLEL,
    "data_parallel_size_local": _NO_DATA_PARALLEL,
    "data_parallel_rank": _NO_DATA_PARALLEL,
    "data_parallel_start_rank": _NO_DATA_PARALLEL,
    "data_parallel_address": _NO_DATA_PARALLEL,
    "data_parallel_rpc_port": _NO_DATA_PARALLEL,
    "data_parallel_backend": _NO_DATA_PARALLEL,
    "data_parallel_hybrid_lb": _NO_DATA_PARALLEL,
    "data_parallel_external_lb": _NO_DATA_PARALLEL,
    "data_parallel_multi_port_external_lb": _NO_DATA_PARALLEL,
    "enable_elastic_ep": _NO_DATA_PARALLEL,
    "elastic_ep_max_dp_size": _NO_DATA_PARALLEL,
    "enable_fault_tolerance": "set recovery instead",
    "fault_tolerance_config": "set recovery instead",
    "nnodes": _OF_NODES,
    "node_rank": _OF_NODES,
    "master_addr": _OF_NODES,
    "master_port": _OF_NODES,
    "device_ids": "Ray gives each replica its GPUs",
    "disable_log_stats": "routing and metrics need the engine's statistics",
    "aggregate_engine_logging": "each replica has metrics of its own",
    "shutdown_timeout": "set recovery.drain_s instead",
    "prefill_context_parallel_size": _WHOLE_CONTEXT,
    "decode_context_parallel_size": _WHOLE_CONTEXT,
    "runner": _GENERATES,
    "convert": _GENERATES,
    "pooler_config": _GENERATES,
}
"""Options of vLLM that this project sets itself or has no use for, and where to say it instead."""
