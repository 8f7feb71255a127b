"""The cluster of these tests: three nodes, Serve on the head, and a fence around each.

Owns all of it from start to end.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import psutil
from node_network import Connection, Namespace, Network
from port_table import Row, openings
from ray_nodes import BIN, ENVIRONMENT, GCS_PORT, RayNode, head_command, started, worker_command

from cluster.health import observe_health
from kvtransfer.phase import Phase

CONFIG = Path(__file__).parent / "cluster.yaml"
START_TIMEOUT_S = 300.0
POLL_S = 0.5
HEALTH_TIMEOUT_S = 5.0

Name = Literal["head", "prefill", "decode"]
NUMBERS: Mapping[Name, int] = {"head": 2, "prefill": 3, "decode": 4}


class NodeCluster(contextlib.ExitStack):
    """Ends with its context, and nothing is left of it. Logs go to `folder`.

    The firewalls let in what `rows` say.
    """

    def __init__(self, folder: Path, rows: Sequence[Row], config: Path = CONFIG) -> None:
        super().__init__()
        self._folder, self._rows, self._config = folder, rows, config
        self._nodes: dict[Name, RayNode] = {}
        self.networks: dict[Name, Namespace] = {}
        self.url = ""

    def start(self) -> None:
        """Raises RuntimeError where it does not start."""
        network = self.enter_context(Network())
        self.networks = {name: network.add(number) for name, number in NUMBERS.items()}
        for name, namespace in self.networks.items():
            namespace.fence(openings(self._rows, name, self.addresses))
        self.url = f"http://{self.networks['head'].address}:8000"
        self._start("head", head_command(self.networks["head"]))
        until(lambda: bool(self.processes("head", "gcs_server")), "Ray's head")
        self.start_worker("prefill")
        self.start_worker("decode")
        serve = self._serve()
        until(lambda: self._is_ready(serve), f"the cluster, see {self._folder};")

    def start_worker(self, phase: Phase) -> None:
        """A node for one pool, for the first time or again."""
        self._start(phase, worker_command(self.networks[phase], self.networks["head"], phase))

    def _start(self, name: Name, command: list[str]) -> None:
        node = started(self.networks[name], command, self._folder / name)
        self._nodes[name] = self.enter_context(node)

    def _serve(self) -> subprocess.Popen[bytes]:
        address = f"--address={self.networks['head'].address}:{GCS_PORT}"
        with (self._folder / "serve.log").open("wb") as log:
            serve = subprocess.Popen(
                self._nodes["head"].inside(str(BIN / "serve"), "run", address, str(self._config)),
                env=os.environ | ENVIRONMENT,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.callback(serve.wait)
        self.callback(serve.kill)
        return serve

    @property
    def addresses(self) -> dict[str, str]:
        return {name: network.address for name, network in self.networks.items()}

    def processes(self, name: Name, part: str) -> list[psutil.Process]:
        """Of a node, those whose command line contains `part`."""
        return self._nodes[name].processes(part)

    def unused_rows(self) -> set[Row]:
        """Those by which nobody has come in."""
        unused = set(self._rows)
        for name, network in self.networks.items():
            for connection in network.accepted():
                unused -= {row for row in unused if row.covers(connection, name, self.addresses)}
        return unused

    def refused(self) -> dict[Name, frozenset[Connection]]:
        """What was asked for at each node and lies beyond the rows; no node where nothing was."""
        refused = {name: network.refused() for name, network in self.networks.items()}
        return {name: connections for name, connections in refused.items() if connections}

    def engine_core(self, phase: Phase) -> psutil.Process:
        (process,) = self.processes(phase, "VLLM::EngineCore")
        return process

    def await_end(self, name: Name) -> None:
        """Of a node that ends by itself."""
        until(lambda: self._nodes[name].has_ended, f"the end of {name}'s node")

    def _is_ready(self, serve: subprocess.Popen[bytes]) -> bool:
        if serve.poll() is not None:
            raise RuntimeError("`serve run` has ended")
        if ended := [name for name, node in self._nodes.items() if node.has_ended]:
            raise RuntimeError(f"the nodes for {', '.join(ended)} have ended")
        return observe_health(self.url, timeout_s=HEALTH_TIMEOUT_S).is_open


def until(condition: Callable[[], bool], what: str, within_s: float = START_TIMEOUT_S) -> None:
    deadline_s = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"{what} is not there after {within_s:g} s")
        time.sleep(POLL_S)
