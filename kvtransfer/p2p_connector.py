"""The connector `nccl`: KV over a torch.distributed group of two for each prefill/decode pair.

Owns the choice of the two sides' classes; the scheduler's is NIXL's. vLLM loads `PdP2pConnector` by
name, see `kvtransfer.config`. Between GPUs the groups are NCCL's, on CPU Gloo's.

- Decode asks prefill for blocks and prefill sends them, after it has looked whether it still holds
  the request under that very lease. So blocks that belong to another request by now are never sent.
- A pair that breaks breaks alone. Its next request makes a new group.
- What cannot be had is computed by decode.
"""

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlPullConnector

from kvtransfer.nixl import PdNixlConnector, PdNixlScheduler
from kvtransfer.p2p_internals import check_p2p_internals
from kvtransfer.p2p_worker import P2pWorker


class PdP2pConnector(PdNixlConnector):
    """The two sides' common face; vLLM makes one per role."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        check_p2p_internals()
        # Past the parents, which would make their own schedulers and workers.
        super(NixlPullConnector, self).__init__(vllm_config, role, kv_cache_config)
        sides = (vllm_config, self.engine_id, kv_cache_config)
        if role == KVConnectorRole.SCHEDULER:
            # What it says to its worker says nothing of NIXL.
            self.connector_scheduler = PdNixlScheduler(*sides)
        else:
            self.connector_worker = P2pWorker(*sides)  # type: ignore[assignment]

    def start_load_kv(self, forward_context: Any, **_: Any) -> None:
        self.connector_worker.start_load_kv(self._get_connector_metadata())

    def wait_for_save(self) -> None:
        """Nothing is saved: prefill keeps its blocks until they are fetched."""
