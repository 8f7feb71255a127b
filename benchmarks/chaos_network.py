"""Faults of the network between two processes of one machine: connections cut, or black-holed.

Both are done from outside, to the very sockets, which Linux lets the same user duplicate: a cut
shuts a socket down, as a reset would; in a black hole a filter on both ends drops all that arrives,
so that neither hears of the other. Owns the duplicates.
"""

import ctypes
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress

import psutil

_SYS_PIDFD_GETFD = 438
"""The same number on all processors (Linux 5.6)."""

_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
_DROP_ALL = struct.pack("HBBI", 0x06, 0, 0, 0)
"""The BPF program `ret 0`."""

_LIBC = ctypes.CDLL(None, use_errno=True)


class Link:
    """All TCP connections between two processes, as they are now. To be closed."""

    def __init__(self, one: int, other: int) -> None:
        """Raises ProcessLookupError or PermissionError where one of them cannot be looked at."""
        self._held = ExitStack()
        self._sockets: list[socket.socket] = []
        try:
            for pid, fd in _ends(one, other):
                self._sockets.append(self._held.enter_context(_duplicate(pid, fd)))
        except psutil.NoSuchProcess as error:
            self._held.close()
            raise ProcessLookupError(str(error)) from None
        except BaseException:
            self._held.close()
            raise

    @property
    def num_connections(self) -> int:
        return len(self._sockets) // 2

    def cut(self) -> None:
        """Ends the connections for both sides."""
        for each in self._sockets:
            with suppress(OSError):  # the other end's cut has ended it already
                each.shutdown(socket.SHUT_RDWR)

    def black_hole(self) -> None:
        """From now on nothing arrives, until `close`; what is sent waits."""
        program = ctypes.create_string_buffer(_DROP_ALL, len(_DROP_ALL))
        fprog = struct.pack("HxxxxxxP", 1, ctypes.addressof(program))
        for each in self._sockets:
            each.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, fprog)

    def close(self) -> None:
        """Lifts a black hole, and leaves the sockets to their owners."""
        for each in self._sockets:
            with suppress(OSError):  # there was none
                each.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
        self._held.close()


def _ends(one: int, other: int) -> Iterator[tuple[int, int]]:
    """Processes and file descriptors, both ends of each connection between two processes."""
    ours = _connections(one)
    theirs = _connections(other)
    for (here, there), fd in ours.items():
        if (there, here) in theirs:
            yield one, fd
            yield other, theirs[there, here]


_Address = tuple[str, int]


def _connections(pid: int) -> dict[tuple[_Address, _Address], int]:
    return {
        (_plain(each.laddr), _plain(each.raddr)): each.fd
        for each in psutil.Process(pid).net_connections(kind="tcp")
        if each.status == psutil.CONN_ESTABLISHED
    }


def _plain(address: Sequence[object]) -> _Address:
    """IPv4 in IPv6's clothes is IPv4."""
    host, port = address[0], address[1]
    return str(host).removeprefix("::ffff:"), int(str(port))


def _duplicate(pid: int, fd: int) -> socket.socket:
    pidfd = os.pidfd_open(pid)
    try:
        found = _LIBC.syscall(_SYS_PIDFD_GETFD, pidfd, fd, 0)
        if found < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        return socket.socket(fileno=found)
    finally:
        os.close(pidfd)
