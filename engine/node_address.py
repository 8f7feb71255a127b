"""An engine's sockets are at its node's address in the cluster, on every node that it has.

Owns these variables of the environment, in a process from which ranks are started later. What the
configuration has set stays.
"""

import os

from kvtransfer.config import transfer_env
from kvtransfer.interfaces import interface_env, observe_interfaces


def keep_to_address(host: str) -> None:
    """To be called before an engine's first process is started."""
    os.environ.update(transfer_env(host))
    for name, value in interface_env(host, observe_interfaces()).items():
        os.environ.setdefault(name, value)
