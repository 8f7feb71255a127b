"""Which nodes are dead, as Ray says.

Owns the question to Ray's control store, which is asked about few nodes and only of late suspects:
a thousand replicas cost nothing. Decides nothing.
"""

from collections.abc import Collection

from ray._common.utils import hex_to_binary
from ray._private.worker import global_worker
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.core.generated.gcs_service_pb2 import GetAllNodeInfoRequest

TIMEOUT_S = 5.0


def dead_nodes(node_ids: Collection[str]) -> frozenset[str]:
    """Those of these nodes that are dead. Blocks, for at most TIMEOUT_S.

    A node that Ray does not know, as after a restart of its control store, is not called dead.

    Raises:
        ray.exceptions.RpcError: Ray does not answer.
    """
    if not node_ids:
        return frozenset()
    selectors = [
        GetAllNodeInfoRequest.NodeSelector(node_id=hex_to_binary(node_id)) for node_id in node_ids
    ]
    found = global_worker.gcs_client.get_all_node_info(
        timeout=TIMEOUT_S, node_selectors=selectors, state_filter=GcsNodeInfo.DEAD
    )
    return frozenset(node_id.hex() for node_id in found)
