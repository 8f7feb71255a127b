"""Which nodes a Ray cluster has, asked of its dashboard.

Owns that question and the reading of its answer; what follows from it is cluster.placement's.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from typing import Any

import ray

from cluster.config import ClusterConfig
from cluster.local_http import OPENER
from cluster.placement import Node, placement_problem, replica_needs

# A child of Serve's own logger, as in cluster.planner.
logger = logging.getLogger("ray.serve.pdserve")

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


def warn_of_what_waits(config: ClusterConfig) -> None:
    """Says why a replica will wait, in a process that is of the cluster.

    It is no error there: an autoscaler may add the node that it waits for.
    """
    if not ray.is_initialized():
        return
    nodes = read_own_nodes(ray.nodes())
    if nodes and (problem := placement_problem(replica_needs(config), nodes)):
        logger.warning(f"{problem}; it waits until the cluster has such nodes")


def read_own_nodes(answer: Sequence[Mapping[str, Any]]) -> tuple[Node, ...]:
    """Reads what `ray.nodes()` gives."""
    return tuple(
        Node(resources=node["Resources"], labels=node.get("Labels") or {})
        for node in answer
        if node["Alive"]
    )


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
