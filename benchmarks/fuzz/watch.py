"""The cluster's processes and ports, while bytes come at them.

Owns the list of those that must not end. Ray's own are Ray's: neither watched nor shot at.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import psutil

_REPLICA = "ray::ServeReplica:"
_ENGINE = "VLLM::"
_PROXY = "/haproxy "
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}
_RAY_PORTS = range(10_002, 20_000)
"""Where Ray has its workers listen for each other, in the replicas' processes as in all others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """A port on which one of the cluster's own processes listens."""

    port: int
    address: str
    process: str

    @property
    def host(self) -> str:
        """Where it is reached from this machine."""
        return _ANY.get(self.address, self.address).removeprefix("::ffff:")

    def __str__(self) -> str:
        return f"{self.process} at {self.address}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A process that ended by itself; `suspects` are the numbers under way then or just before."""

    process: str
    pid: int
    at_s: float
    suspects: tuple[int, ...]


class Watch:
    """The processes below `leader` that were there at the last look."""

    def __init__(self, leader: psutil.Process) -> None:
        self._leader = leader
        self._known: dict[int, tuple[psutil.Process, str]] = {}
        self.renew()

    def renew(self) -> None:
        """Looks for processes that have come; takes tens of milliseconds."""
        for process in self._leader.children(recursive=True):
            name = label(_command(process))
            if name is not None and _lives(process):
                self._known.setdefault(process.pid, (process, name))

    def ended(self) -> list[tuple[str, int]]:
        """Those that have ended since the last look, each once."""
        gone = [(name, pid) for pid, (process, name) in self._known.items() if not _lives(process)]
        for _, pid in gone:
            del self._known[pid]
        return gone

    def listeners(self) -> tuple[Listener, ...]:
        """The ports of the known processes, in an order that is the same in every run."""
        found = [
            Listener(port=port, address=address, process=name)
            for process, name in self._known.values()
            for address, port in _listening(process)
            if not (name in _REPLICAS and port in _RAY_PORTS)
        ]
        return tuple(sorted(found, key=lambda each: (each.process, each.port)))


_REPLICAS = ("router", "prefill", "decode")


def label(command: str) -> str | None:
    """What a process is to the cluster, by its command or title; None if it is not watched."""
    if command.startswith(_REPLICA):
        # "ray::ServeReplica:APPLICATION:DEPLOYMENT", and ".METHOD" while it runs one.
        return command.partition(" ")[0].partition(".")[0].rpartition(":")[2]
    if command.startswith(_ENGINE):
        return command.partition(" ")[0]
    if _PROXY in f"{command} ":
        return "HAProxy"
    return None


def that_count(ended: Iterable[Ended]) -> tuple[Ended, ...]:
    """Those that ended by themselves: HAProxy is started anew, with its new targets, when a router
    has ended."""
    ended = tuple(ended)
    routers = any(each.process == "router" for each in ended)
    return tuple(each for each in ended if not (routers and each.process == "HAProxy"))


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _listening(process: psutil.Process) -> list[tuple[str, int]]:
    try:
        sockets = process.net_connections(kind="tcp")
    except psutil.NoSuchProcess:
        return []
    return [
        (each.laddr.ip, each.laddr.port) for each in sockets if each.status == psutil.CONN_LISTEN
    ]
