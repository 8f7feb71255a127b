"""Where the ranks of an engine that spans nodes find each other: one of torch's stores.

Owns its socket. By itself rank 0 would open it, at every address of its host and at a port that was
chosen beforehand and may be another's by then.
"""

import socket
from collections.abc import Mapping
from typing import Any

from torch._C._distributed_c10d import TCPStore

RANK_ENV: Mapping[str, str] = {
    # torch's own name for a store that is there already: every rank only connects to it.
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
"""Environment of the engine's ranks, on each of its nodes."""


class Meeting:
    """A store that listens for as long as this object lives: the engine's whole life."""

    def __init__(self, host: str, num_nodes: int) -> None:
        """Listens at this node's address `host`. Raises OSError where it has no such address."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, 0), family=family)
        self._host, self._num_nodes = host, num_nodes
        self.port: int = listener.getsockname()[1]
        # It owns the socket from here on.
        self._store = TCPStore(
            host,
            self.port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
            use_libuv=True,
        )

    def options(self, node: int) -> dict[str, Any]:
        """vLLM's engine arguments on each of the nodes, of which number 0 has the engine core."""
        return node_options(self._num_nodes, node=node, host=self._host, port=self.port)


def node_options(num_nodes: int, *, node: int, host: str, port: int) -> dict[str, Any]:
    """vLLM's engine arguments on one node of an engine whose ranks meet at `host`:`port`."""
    return {
        # The only one of vLLM's that spans nodes. In a placement group it would choose Ray's.
        "distributed_executor_backend": "mp",
        "nnodes": num_nodes,
        "node_rank": node,
        "master_addr": host,
        "master_port": port,
    }
