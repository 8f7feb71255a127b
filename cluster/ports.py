"""TCP ports on this machine: is one free, who has it, and which others are free.

Owns no port: what is free now may be taken a moment later.
"""

import contextlib
import errno
import socket
from collections.abc import Sequence
from contextlib import ExitStack

import psutil

LOCALHOST = "127.0.0.1"


def is_free(port: int, *, host: str = LOCALHOST) -> bool:
    """Whether a server could listen on the port now. Raises OSError if `host` is not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As servers do: connections of an earlier one that linger must not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return False
    return True


def owner(port: int) -> str | None:
    """The process that listens on the port, for a message; None where we may not know."""
    return next(map(described, listeners(port)), None)


def described(process: psutil.Process) -> str:
    """A process, for a message."""
    return f"{process.name()}, process {process.pid}"


def listeners(port: int) -> list[psutil.Process]:
    """The processes that listen on the port, of those that we may know."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.AccessDenied:
        return []
    pids = {
        connection.pid: None
        for connection in connections
        if connection.status == psutil.CONN_LISTEN
        and connection.laddr
        and connection.laddr.port == port
        and connection.pid
    }
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(pid))
    return found


def pick_free(preferred: Sequence[int | None]) -> list[int]:
    """A free port for each entry: the preferred one, or any where that is None or taken."""
    with ExitStack() as held:  # all at once, so that they differ
        sockets = [held.enter_context(_bind_or_any(port)) for port in preferred]
        return [each.getsockname()[1] for each in sockets]


def _bind_or_any(port: int | None) -> socket.socket:
    if port is not None:
        with contextlib.suppress(OSError):
            return socket.create_server((LOCALHOST, port))
    return socket.create_server((LOCALHOST, 0))
