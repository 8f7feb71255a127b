"""The vLLM settings with which an engine takes part in KV transfer.

Owns the connector's options. Never starts an engine.
"""

from collections.abc import Sequence
from typing import Any, Literal

from vllm.platforms import current_platform

from kvtransfer.pair_reads import READ_TIMEOUT_S
from kvtransfer.phase import Phase

Connector = Literal["nixl", "nccl"]
Sharing = Literal["auto", "never"]

_KV_ROLES = {"prefill": "kv_producer", "decode": "kv_consumer"}
_CONNECTORS: dict[Connector, tuple[str, str]] = {
    "nixl": ("PdNixlConnector", "kvtransfer.nixl"),
    "nccl": ("PdP2pConnector", "kvtransfer.p2p_connector"),
}


def kv_transfer_config(
    role: Phase,
    *,
    engine_id: str,
    lease_s: int,
    backends: Sequence[str],
    connector: Connector = "nixl",
    read_timeout_s: float = READ_TIMEOUT_S,
    shared_memory: Sharing = "auto",
    progress_delay_us: int | None = None,
    side_channel_port: int | None = None,
) -> dict[str, Any]:
    """Arguments of vLLM's `KVTransferConfig`.

    `engine_id` must be new for every start of an engine: peers know an agent by it. `lease_s` is
    how long prefill keeps blocks that nobody reads or asks to keep; a decode's heartbeat, every
    sixth of it, extends it. `backends` are NIXL's; `nccl`, which is Gloo on CPU, has none.
    `read_timeout_s` is how long a prefill that is being read may be silent before decode asks it
    for a sign of life, and then before it is taken for gone and its blocks are computed. With
    `shared_memory` a decode copies the blocks of a prefill on its host from memory that both map,
    on CPU and over `nixl`. `progress_delay_us` is how often NIXL's progress thread looks without
    being told, 0 to poll for ever; None for `kvtransfer.agent`'s choice. `side_channel_port` is a
    `ReservedPort`'s; without one the kernel chooses when the engine starts.
    """
    class_name, module = _CONNECTORS[connector]
    extra = {
        "kv_lease_duration": lease_s,
        "backends": list(backends),
        "read_timeout_s": read_timeout_s,
        "shared_memory": shared_memory,
        "progress_delay_us": progress_delay_us,
    }
    if side_channel_port is not None:
        extra["side_channel_port"] = side_channel_port
    return {
        "kv_connector": class_name,
        "kv_connector_module_path": module,
        "kv_role": _KV_ROLES[role],
        "engine_id": engine_id,
        "kv_buffer_device": current_platform.device_type,
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }


def transfer_env(host: str) -> dict[str, str]:
    """Environment of an engine that hands KV over.

    `host` is the address of this host that its peers can reach. No port: the connector binds a free
    one and names it in the params of each handoff.
    """
    return {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": host,
        # Of models with recurrent state: the layout that can be read in parts. vLLM chooses it by
        # the connector's name on CPUs, and not at all elsewhere.
        "VLLM_SSM_CONV_STATE_LAYOUT": "DS",
    }
