"""Which nodes a Ray cluster has, asked of its dashboard.

Owns that question and the reading of its answer; what follows from it is cluster.placement's.
"""

import json
import os
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any

from cluster.config import ClusterConfig
from cluster.local_http import OPENER
from cluster.placement import Node, placement_problem, replica_needs

TIMEOUT_S = 5.0
_ADDRESSES = ("RAY_DASHBOARD_ADDRESS", "RAY_API_SERVER_ADDRESS")


def known_dashboard(environment: Mapping[str, str] = os.environ) -> str | None:
    """The dashboard of the Ray cluster that this shell talks to, as Ray's own commands see it."""
    addresses = [environment.get(name, "") for name in _ADDRESSES]
    return next((each.rstrip("/") for each in addresses if each.startswith("http")), None)


def unplaceable(config: ClusterConfig, dashboard_url: str) -> str | None:
    """Why the nodes cannot ever hold a replica; None where they can, or nobody answers."""
    nodes = observe_nodes(dashboard_url)
    return placement_problem(replica_needs(config), nodes) if nodes else None


def observe_nodes(dashboard_url: str) -> tuple[Node, ...]:
    """The live nodes; none where nobody answers."""
    try:
        with OPENER.open(f"{dashboard_url}/api/v0/nodes", timeout=TIMEOUT_S) as response:
            return read_nodes(json.load(response))
    except (OSError, HTTPException, ValueError):
        return ()


def read_nodes(answer: Mapping[str, Any]) -> tuple[Node, ...]:
    """Reads the answer of Ray's `GET /api/v0/nodes`."""
    # Empty while no node has registered; without data where the cluster does not answer itself.
    listed = ((answer.get("data") or {}).get("result") or {}).get("result") or []
    return tuple(
        Node(resources=node["resources_total"], labels=node["labels"] or {})
        for node in listed
        if node["state"] == "ALIVE"
    )
