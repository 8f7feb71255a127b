"""vLLM's own NIXL connector with a progress thread that waits instead of spinning.

Owns nothing but that swap, for the tuned peer; the peer's transfers are vLLM's. The class keeps the
name `NixlConnector`, because Ray Serve LLM decides by it how to set a replica up.
"""

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlPullConnector

from kvtransfer.agent import replace_spinning_agent


class NixlConnector(NixlPullConnector):  # type: ignore[misc]
    """Named by `kv_connector_module_path` in `benchmarks.ray_llm`."""

    def __init__(self, vllm_config: object, role: KVConnectorRole, kv_cache_config: object) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if role == KVConnectorRole.WORKER:
            worker = self.connector_worker
            replace_spinning_agent(worker.nixl_wrapper, worker.device_type)
