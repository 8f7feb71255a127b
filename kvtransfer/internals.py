"""The names inside vLLM and NIXL that this package relies on, checked before an engine starts.

Both are pinned exactly (pyproject.toml). Whoever moves a pin reads this list first.
"""

from importlib import import_module

from kvtransfer.errors import InternalsChanged

VLLM_VERSION = "0.32.0"
NIXL_VERSION = "1.5"

_CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1"

RELIED_ON = {
    "vllm.config:KVTransferConfig": (
        "is_kv_producer",
        "kv_connector_module_path",
        "kv_load_failure_policy",
    ),
    "vllm:__version__": (),
    "vllm.distributed:get_world_group": (),
    "vllm.distributed.kv_transfer:get_kv_transfer_group": (),
    "vllm.v1.engine.core_client:AsyncMPClient": ("abort_requests_async", "collective_rpc_async"),
    "vllm.v1.request:RequestStatus": ("FINISHED_STOPPED",),
    f"{_CONNECTOR}.base:KVConnectorRole": ("SCHEDULER", "WORKER"),
    f"{_CONNECTOR}.nixl.connector:NixlPullConnector": ("build_kv_connector_stats",),
    f"{_CONNECTOR}.nixl.metadata:NixlAgentMetadata": ("__dataclass_fields__",),
    f"{_CONNECTOR}.nixl.metadata:NIXL_CONNECTOR_VERSION": (),
    f"{_CONNECTOR}.nixl.metadata:NixlConnectorMetadata": (),
    f"{_CONNECTOR}.nixl.metadata:NixlHandshakePayload": ("__dataclass_fields__",),
    f"{_CONNECTOR}.nixl.pull_scheduler:NixlPullConnectorScheduler": (
        "_prefill_backoff",
        "build_connector_meta",
        "get_num_new_matched_tokens",
        "request_finished",
        "set_xfer_handshake_metadata",
        "shutdown",
        "update_state_after_alloc",
    ),
    # Of its attributes, which no class shows, the worker uses: _engine_last_active,
    # _handshake_futures, _handshake_initiation_executor, _handshake_lock, _has_mamba,
    # _invalid_engine_backoff, _invalid_remote_engines, _is_csa_linear, _mixed_mem_types,
    # _pending_recv_notifs, _ready_requests, _recv_failures, _recving_metadata, _registered_descs,
    # _remote_agents, _reqs_to_process, _reqs_to_send, compat_hash, device_id, enforce_compat_hash,
    # kv_cache_layout, nixl_backends, nixl_wrapper, transfer_topo, transfer_tp_size,
    # use_host_buffer, xfer_handshake_metadata. And of the model's layers, kv_cache.
    f"{_CONNECTOR}.nixl.pull_worker:NixlPullConnectorWorker": (
        "_TRANSFER_MODE",
        "_cleanup_remote_engine",
        "_cleanup_remote_engines",
        "_ensure_handshake",
        "_get_new_notifs",
        "_handle_failed_transfer",
        "_log_failure",
        "_nixl_handshake",
        "_pop_done_transfers",
        "_read_blocks",
        "_read_blocks_for_req",
        "_send_pending_recv_notifs",
        "_validate_csa_linear_tp_layout",
        "_validate_remote_parallel_config",
        "add_remote_agent",
        "get_transfer_results",
        "register_kv_caches",
        "start_load_kv",
    ),
    f"{_CONNECTOR}.nixl.stats:NixlKVConnectorStats": (
        "aggregate",
        "clone_and_reset",
        "is_empty",
        "record_transfer",
        "reset",
    ),
    "nixl._api:nixl_agent": (
        "check_xfer_state",
        "create_backend",
        "get_reg_descs",
        "get_xfer_descs",
        "get_xfer_telemetry",
        "initialize_xfer",
        "make_prepped_xfer",
        "prep_xfer_dlist",
        "register_memory",
        "release_dlist_handle",
        "release_xfer_handle",
        "transfer",
    ),
    "nixl._bindings:nixlAgent": ("createBackend",),
    "nixl._bindings:nixlAgentConfig": (
        "captureTelemetry",
        "pthrDelay",
        "syncMode",
        "useListenThread",
        "useProgThread",
    ),
    "nixl._bindings:NIXL_THREAD_SYNC_NONE": (),
    # Of the PyTorch that vLLM pins, to know whether a KV cache was moved whole.
    "torch:UntypedStorage": ("_new_with_weak_ptr",),
    "torch.multiprocessing.reductions:StorageWeakRef": ("expired",),
}


def check_internals() -> None:
    """Raises InternalsChanged, in one line, where vLLM or NIXL lacks a name we rely on."""
    for place, names in RELIED_ON.items():
        module_name, _, owner_name = place.partition(":")
        try:
            owner = getattr(import_module(module_name), owner_name)
        except (ImportError, AttributeError):
            raise InternalsChanged(f"{place} does not exist: {_pins(place)}") from None
        for name in names:
            if not hasattr(owner, name):
                raise InternalsChanged(f"{place} has no {name}: {_pins(place)}")


def _pins(place: str) -> str:
    if place.startswith("nixl"):
        return f"pdserve needs nixl {NIXL_VERSION}"
    return f"pdserve needs vLLM {VLLM_VERSION}"
