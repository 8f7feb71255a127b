"""The names inside vLLM and torch that the point-to-point connector relies on, checked at start.

Owns that list. What the connector inherits from the NIXL connector is in `kvtransfer.internals`.
"""

from importlib import import_module

from kvtransfer.errors import InternalsChanged
from kvtransfer.internals import VLLM_VERSION

_CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1"
_PINS = f"pdserve needs vLLM {VLLM_VERSION} and its torch"

RELIED_ON = {
    f"{_CONNECTOR}.base:KVConnectorTransferResults": (
        "finished_sending",
        "finished_recving",
        "failed_recving",
    ),
    f"{_CONNECTOR}.nixl.metadata:ReqMeta": ("local_block_ids", "awaiting_kvs"),
    f"{_CONNECTOR}.nixl.metadata:RemoteMeta": (
        "block_ids",
        "engine_id",
        "host",
        "port",
        "request_id",
    ),
    f"{_CONNECTOR}.nixl.metadata:HeartbeatInfo": ("host", "port", "req_ids"),
    "vllm.v1.kv_cache_interface:KVCacheConfig": ("num_blocks", "transfer_group_index_by_layer"),
    "vllm.distributed:get_pp_group": (),
    "vllm.distributed:get_tensor_model_parallel_rank": (),
    "torch._C._distributed_c10d:ProcessGroupGloo": ("_Options", "create_device", "recv", "send"),
}


def check_p2p_internals() -> None:
    """Raises InternalsChanged, in one line, where vLLM or torch lacks a name we rely on."""
    for place, names in RELIED_ON.items():
        module_name, _, owner_name = place.partition(":")
        try:
            owner = getattr(import_module(module_name), owner_name)
        except (ImportError, AttributeError):
            raise InternalsChanged(f"{place} does not exist: {_PINS}") from None
        fields = getattr(owner, "__dataclass_fields__", {})
        for name in names:
            if name not in fields and not hasattr(owner, name):
                raise InternalsChanged(f"{place} has no {name}: {_PINS}")
