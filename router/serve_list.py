"""Which replicas run, as Ray Serve says.

Owns the subscription to Serve's lists of running replicas. Connects to nobody.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray.serve._private.common import DeploymentID
from ray.serve._private.long_poll import LongPollClient, LongPollNamespace
from ray.serve.context import _get_global_client


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedReplica:
    """One replica that runs."""

    replica_id: str
    address: tuple[str, int]
    """Where it lets routers in."""
    node_id: str | None = None
    """Of Ray."""


Changed = Callable[[str, Mapping[str, ListedReplica]], None]
"""Told the whole list of a deployment, by replica id, whenever it has changed."""


class ServeList:
    """Follows the lists of some deployments of one application."""

    def __init__(
        self, deployments: Iterable[str], *, application: str, router_id: str, changed: Changed
    ) -> None:
        controller = _get_global_client()._controller
        listeners = {
            (
                LongPollNamespace.DEPLOYMENT_TARGETS,
                DeploymentID(name=name, app_name=application),
            ): partial(_tell, changed, name)
            for name in deployments
        }
        self._subscription = LongPollClient(
            controller,
            listeners,
            call_in_event_loop=asyncio.get_running_loop(),
            client_id=f"pdserve-router:{router_id}",
        )

    def close(self) -> None:
        self._subscription.stop()


def _tell(changed: Changed, deployment: str, targets: Any) -> None:
    # A replica without metadata does not listen yet.
    listed = (_listed(info) for info in targets.running_replicas if info.replica_metadata)
    changed(deployment, {each.replica_id: each for each in listed})


def _listed(info: Any) -> ListedReplica:
    metadata = info.replica_metadata
    return ListedReplica(
        replica_id=info.replica_id.unique_id,
        address=(metadata["host"], metadata["port"]),
        node_id=info.node_id,
    )
