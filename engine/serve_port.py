"""The port at which Serve has each replica listen for calls of other replicas over gRPC.

It is bound to every address of the host, and what comes is unpickled before anybody is asked who
they are: who reaches it can run code. Here it is bound to the node's address in the cluster, which
is what Serve tells others. Owns nothing; changes what Serve calls in this process.
"""

import ipaddress
from typing import Any

import ray
from ray.serve._private import replica

from engine.errors import EngineInternalsChanged

ADDS_PORT = "add_port_to_grpc_server"
EVERYWHERE = "[::]:0"


def keep_to_cluster_address() -> None:
    """To be called before Serve takes the replica for initialised: in its constructor.

    Raises EngineInternalsChanged: this Serve opens its port in another way.
    """
    add_port = getattr(replica, ADDS_PORT, None)
    if add_port is None:
        raise EngineInternalsChanged(f"ray.serve._private.replica has no {ADDS_PORT}")

    def add_port_here(server: Any, address: str) -> Any:
        if address != EVERYWHERE:
            return add_port(server, address)
        return add_port(server, f"{_bracketed(ray.util.get_node_ip_address())}:0")

    setattr(replica, ADDS_PORT, add_port_here)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ipaddress.ip_address(host).version == 6 else host
