"""A small process beside an HAProxy, that has it end when the Ray that it is of has ended.

Run as `python haproxy_watch.py HAPROXY_PID RAY_PID`; it imports nothing but the standard library,
and ends with the HAProxy.
"""

import contextlib
import os
import select
import signal
import sys

SOFT_STOP = signal.SIGUSR1
"""On which HAProxy closes its ports, and ends when its last answer does."""


def start_watch(ray_pid: int) -> None:
    """Has this process, or what it becomes by an exec, end some time after the other."""
    arguments = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(ray_pid)]
    silent = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
    os.posix_spawn(sys.executable, arguments, {}, file_actions=silent, setsid=True)


def main() -> None:
    proxy_pid, ray_pid = map(int, sys.argv[1:])
    proxy = os.pidfd_open(proxy_pid)
    if os.getppid() != proxy_pid:
        return  # it has ended, and the number may be another's
    with contextlib.suppress(ProcessLookupError):  # Ray has ended already
        first_end = select.poll()
        for ended in (proxy, os.pidfd_open(ray_pid)):
            first_end.register(ended, select.POLLIN)
        first_end.poll()
    with contextlib.suppress(ProcessLookupError):  # it was the proxy
        signal.pidfd_send_signal(proxy, SOFT_STOP)


if __name__ == "__main__":
    main()
