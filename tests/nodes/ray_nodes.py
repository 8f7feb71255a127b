"""Ray nodes on a made-up network, each with processes, /tmp and /dev/shm of its own.

Owns a node's processes from start to end: they live in a PID namespace, which ends all at once.
"""

import contextlib
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from node_network import Namespace
from servers import descendants

from cluster.haproxy import command_path
from cluster.ports import LOCALHOST

BIN = Path(sys.executable).parent
GCS_PORT = 6379
"""The other ports are those of docs/deployment.md."""
PORTS = (
    "--node-manager-port=6380",
    "--object-manager-port=6381",
    "--runtime-env-agent-port=6382",
    "--dashboard-agent-grpc-port=6383",
    "--dashboard-agent-listen-port=6384",
    "--metrics-export-port=6385",
    "--min-worker-port=10002",
    "--max-worker-port=10999",
)
OBJECT_STORE_BYTES = 100 * 1024**2

ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_BINARY_PATH": str(command_path()),
    "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "180",
    # A node that does not answer is dead after 20 s; by default it takes Ray over a minute.
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "4",
}

# `$0` is the folder that becomes the node's /tmp. The shell is the namespace's init: it collects
# orphans, which a program would not.
NODE = (
    'mount --bind "$0" /tmp && mount -t tmpfs tmpfs /dev/shm && hostname "$1" && shift && "$@"; '
    "exit $?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RayNode:
    """A running node."""

    namespace: Namespace
    process: psutil.Process
    """The namespaces' owner; all others descend from it."""
    log: Path

    @property
    def has_ended(self) -> bool:
        return self.process.status() == psutil.STATUS_ZOMBIE

    def processes(self, name: str) -> list[psutil.Process]:
        """Those whose command line contains `name`."""
        return descendants(self.process, name)

    def inside(self, *command: str) -> list[str]:
        """What runs a command on this node."""
        (init,) = self.process.children()
        return ["nsenter", f"--target={init.pid}", "--all", f"--wd={Path.cwd()}", *command]


def head_command(namespace: Namespace) -> list[str]:
    head = ("--head", f"--port={GCS_PORT}", f"--dashboard-host={LOCALHOST}", "--num-cpus=3")
    return _ray_command(namespace, *head)


def worker_command(namespace: Namespace, head: Namespace, phase: str) -> list[str]:
    """Of a node for one pool."""
    address = f"--address={head.address}:{GCS_PORT}"
    return _ray_command(namespace, address, f"--labels=phase={phase}", "--num-cpus=1")


def _ray_command(namespace: Namespace, *options: str) -> list[str]:
    return [
        str(BIN / "ray"),
        "start",
        "--block",
        f"--node-ip-address={namespace.address}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        "--disable-usage-stats",
        *PORTS,
        *options,
    ]


@contextlib.contextmanager
def started(namespace: Namespace, command: Sequence[str], folder: Path) -> Iterator[RayNode]:
    """A node, until the context is left. Ray's logs are in `folder`/ray."""
    folder.mkdir(exist_ok=True)
    log = folder / "node.log"
    # Whatever ends this process ends the node: nothing outlives its parent.
    inside = ("ip", "netns", "exec", namespace.name, "setpriv", "--pdeathsig=KILL")
    unshare = ("unshare", "--fork", "--kill-child", "--pid", "--mount-proc", "--ipc", "--uts")
    with log.open("ab") as output:
        child = subprocess.Popen(
            [*inside, *unshare, "sh", "-c", NODE, str(folder), namespace.name, *command],
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    process = psutil.Process(child.pid)
    try:
        yield RayNode(namespace=namespace, process=process, log=log)
    finally:
        # The kernel ends whatever is in the PID namespace with the first process in it.
        inits = process.children() if child.poll() is None else []
        child.kill()
        child.wait()
        psutil.wait_procs(inits)
