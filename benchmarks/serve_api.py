"""Serve's REST API, as the dashboard of a cluster that `pdserve up` has started offers it.

Owns the form of a redeployment that changes numbers of replicas and nothing else.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

_PATH = "/api/serve/applications/"
_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeReplica:
    """A replica as Serve lists it. `replica_id` is what the metrics call it; `pid` is None until
    it has a process."""

    deployment: str
    replica_id: str
    state: str
    pid: int | None


class ServeApi:
    """The API of the cluster that printed `log`, with the config that it was started with.

    Its methods raise httpx.HTTPError where Serve does not answer, or not with success.
    """

    def __init__(self, log: Path, config: Path) -> None:
        found = re.search(r"dashboard +(http://\S+)", log.read_text(errors="replace"))
        if found is None:
            raise ValueError(f"{log} does not say where the dashboard is")
        self._url = found.group(1) + _PATH
        self._config = config

    async def scale(self, nums: Mapping[str, int]) -> None:
        """Asks for so many replicas of each deployment; does not wait for them."""
        config: dict[str, Any] = yaml.safe_load(self._config.read_text())
        (application,) = config["applications"]
        application["deployments"] = [
            {"name": name, "num_replicas": num} for name, num in nums.items()
        ]
        async with httpx.AsyncClient(timeout=_TIMEOUT_S) as client:
            response = await client.put(self._url, json=config)
        response.raise_for_status()

    async def replicas(self) -> tuple[ServeReplica, ...]:
        """All that Serve lists, in any state."""
        async with httpx.AsyncClient(timeout=_TIMEOUT_S) as client:
            response = await client.get(self._url)
        response.raise_for_status()
        return tuple(
            ServeReplica(
                deployment=name,
                replica_id=replica["replica_id"],
                state=replica["state"],
                pid=replica.get("pid"),
            )
            for application in response.json()["applications"].values()
            for name, deployment in application["deployments"].items()
            for replica in deployment["replicas"]
        )
