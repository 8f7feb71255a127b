"""The cluster's processes as an operator sees them: found by name, sent signals, counted.

Owns the knowledge of which process is what. It starts none and decides nothing.
"""

import signal
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.chaos_faults import Kind, Member
from kvtransfer.phase import PHASES, Phase

_REPLICA = "ray::ServeReplica:"
_ENGINE = "VLLM::"

_ROUTER_PORTS = range(30_000, 31_000)
"""Where Serve has ingress replicas listen: its RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT and MAX."""

_ESTABLISHED = "01"
"""In /proc/net/tcp."""

_STOPPED_OR_ENDED = frozenset("TZX")
"""A thread's states in /proc/PID/task/TID/stat."""

_SUSPEND_POLL_S = 0.001
_END_TIMEOUT_S = 45.0
_GRACE_S = 5.0

_SIGNALS: Mapping[Kind, signal.Signals] = {
    Kind.KILL_REPLICA: signal.SIGKILL,
    Kind.KILL_ENGINE: signal.SIGKILL,
    Kind.STOP_ENGINE: signal.SIGSTOP,
    Kind.TERM_REPLICA: signal.SIGTERM,
    Kind.CROWD: signal.SIGKILL,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterProcess:
    """A router, and the port on which it alone answers."""

    pid: int
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    pid: int
    parent_pid: int
    created_s: float
    title: str


def find_members(leader: psutil.Process) -> dict[Phase, list[Member]]:
    """Each pool's replicas below `leader`, in any state. Takes tens of milliseconds."""
    seen = _look_below(leader)
    found: dict[Phase, list[Member]] = {pool: [] for pool in PHASES}
    for process in seen.values():
        pool = next((pool for pool in PHASES if _is_replica(process.title, pool)), None)
        if pool is None:
            continue
        engines = [
            each.pid
            for each in seen.values()
            if each.title.startswith(_ENGINE) and process.pid in _ancestors(each, seen)
        ]
        member = Member(
            pid=process.pid,
            created_s=process.created_s,
            # The engine core; workers, if it has any, descend from it.
            engine_pid=min(engines, key=lambda pid: seen[pid].created_s, default=None),
        )
        found[pool].append(member)
    return found


def find_routers(leader: psutil.Process) -> list[RouterProcess]:
    """The routers below `leader` that let HAProxy in. Takes tens of milliseconds."""
    found = []
    for process in _look_below(leader).values():
        if not _is_replica(process.title, "router"):
            continue
        try:
            sockets = psutil.Process(process.pid).net_connections(kind="tcp")
        except psutil.NoSuchProcess:
            continue
        ports = [
            each.laddr.port
            for each in sockets
            if each.status == psutil.CONN_LISTEN and each.laddr.port in _ROUTER_PORTS
        ]
        if ports:
            found.append(RouterProcess(pid=process.pid, port=min(ports)))
    return found


def count_connections(router: RouterProcess) -> int:
    """How many connections the proxy has to a router, those included that it has not accepted yet.

    Quick, as it must be between two signals: no process is looked at.
    """
    port = f":{router.port:04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    sockets = (line.split() for line in lines)
    return sum(local.endswith(port) and state == _ESTABLISHED for _, local, _, state, *_ in sockets)


def engine_below(replica_pid: int) -> int | None:
    """The engine core of a replica; None if either is gone."""
    try:
        below = psutil.Process(replica_pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return None
    engines = [each for each in below if _title(each).startswith(_ENGINE)]
    return engines[0].pid if engines else None


def tree_of(pid: int) -> list[int]:
    """A process and its descendants; empty if it is gone."""
    try:
        process = psutil.Process(pid)
        return [pid, *(each.pid for each in process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def rss_bytes(pid: int) -> int | None:
    """The resident memory of a process; None if it is gone."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:
        return None


def find_stray_engines(leader: psutil.Process) -> list[int]:
    """Processes of engines whose replica is gone."""
    seen = _look_below(leader)
    return [
        each.pid
        for each in seen.values()
        if each.title.startswith(_ENGINE)
        and not any(seen[pid].title.startswith(_REPLICA) for pid in _ancestors(each, seen))
    ]


def send(kind: Kind, member: Member) -> int | None:
    """Does `kind`, one that hits a pool, to a replica; returns the pid, or None if it was gone."""
    engine = kind in (Kind.KILL_ENGINE, Kind.STOP_ENGINE, Kind.CROWD)
    pid = member.engine_pid if engine else member.pid
    if pid is None:
        return None
    return pid if signal_process(pid, _SIGNALS[kind]) else None


def signal_process(pid: int, number: signal.Signals) -> bool:
    """Sends a signal; false if the process was gone."""
    try:
        psutil.Process(pid).send_signal(number)
    except psutil.NoSuchProcess:
        return False
    return True


def suspend(pid: int) -> bool:
    """Stops a process, and returns when none of its threads runs; false if the process was gone.

    The signal alone does not do: threads go on until the kernel gets to them, milliseconds on busy
    cores.
    """
    if not signal_process(pid, signal.SIGSTOP):
        return False
    while _runs(pid):
        time.sleep(_SUSPEND_POLL_S)
    return True


def _runs(pid: int) -> bool:
    try:
        stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    except OSError:
        return True  # A thread ended meanwhile: look again.
    return any(stat.rpartition(")")[2].split()[0] not in _STOPPED_OR_ENDED for stat in stats)


def still_stopped(pids: Iterable[int]) -> list[int]:
    """Those of the processes that were stopped which are still there, still stopped."""
    there = []
    for pid in pids:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_STOPPED:
                there.append(pid)
        except psutil.NoSuchProcess:
            continue
    return there


def end(process: subprocess.Popen[bytes]) -> list[str]:
    """Ends the cluster as Ctrl-C does; returns the processes that it leaves, "pid: command".

    Needs `benchmarks.systems.adopt_orphans` before the start: orphans are then found here.
    """
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return [f"{process.pid}: it did not end within {_END_TIMEOUT_S:g} s of SIGINT"]
    # The wait also collects those that have ended already.
    _, left = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=_GRACE_S)
    return [f"{each.pid}: {_title(each)[:100]}" for each in left if each.is_running()]


def _is_replica(title: str, deployment: str) -> bool:
    # "ray::ServeReplica:APPLICATION:DEPLOYMENT", and ".METHOD" while it runs one.
    name = title.partition(" ")[0].partition(".")[0]
    return name.startswith(_REPLICA) and name.endswith(f":{deployment}")


def _look_below(leader: psutil.Process) -> dict[int, _Seen]:
    """The living processes below `leader` by pid."""
    seen = {}
    for process in leader.children(recursive=True):
        with process.oneshot():
            try:
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                seen[process.pid] = _Seen(
                    pid=process.pid,
                    parent_pid=process.ppid(),
                    created_s=process.create_time(),
                    title=_title(process),
                )
            except psutil.NoSuchProcess:
                continue
    return seen


def _ancestors(process: _Seen, seen: Mapping[int, _Seen]) -> list[int]:
    found = []
    while (parent := seen.get(process.parent_pid)) is not None:
        found.append(parent.pid)
        process = parent
    return found


def _title(process: psutil.Process) -> str:
    """The command line, which Ray and vLLM replace by a title; empty for what has ended."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
