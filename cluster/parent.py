"""A process that does not outlive its parent, however that ends.

Owns the request to the kernel, which an exec keeps.
"""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def end_with_parent(number: signal.Signals, *, parent_pid: int) -> None:
    """Has the kernel send this process a signal when the parent's thread that started it ends.

    `parent_pid` is the parent that it was started by: that may have ended already.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), number)
