"""The vLLM settings with which an engine takes part in KV transfer.

Owns the connector's options. Never starts an engine.
"""

from collections.abc import Sequence
from typing import Any, Literal

from vllm.platforms import current_platform

Role = Literal["prefill", "decode"]
_KV_ROLES = {"prefill": "kv_producer", "decode": "kv_consumer"}


def kv_transfer_config(
    role: Role, *, engine_id: str, lease_s: int, backends: Sequence[str]
) -> dict[str, Any]:
    """Arguments of vLLM's `KVTransferConfig`.

    `engine_id` must be new for every start of an engine: peers know an agent by it. `lease_s` is
    how long prefill keeps blocks that nobody reads or asks to keep; a decode's heartbeat, every
    sixth of it, extends it.
    """
    return {
        "kv_connector": "PdNixlConnector",
        "kv_connector_module_path": "kvtransfer.nixl",
        "kv_role": _KV_ROLES[role],
        "engine_id": engine_id,
        "kv_buffer_device": current_platform.device_type,
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"kv_lease_duration": lease_s, "backends": list(backends)},
    }


def side_channel_env(host: str) -> dict[str, str]:
    """Environment of an engine: the address of this host that its peers can reach.

    No port: the connector binds a free one and names it in the params of each handoff.
    """
    return {"VLLM_NIXL_SIDE_CHANNEL_HOST": host}
