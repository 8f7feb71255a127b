"""`pdserve up`: Ray and Serve on this machine, in the foreground, until Ctrl-C.

Owns a Ray cluster of its own, from the first process to the last; it neither uses nor disturbs one
that runs already. For a cluster of several machines use `ray start` and `serve run` instead.
"""

import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster import ports
from cluster.errors import ConfigError, StartError
from cluster.first_answer import FirstAnswer, Problem
from cluster.haproxy import command_path as haproxy_command_path
from cluster.health import Health, observe_health
from cluster.model_choice import prepare_model
from cluster.nodes import unplaceable
from cluster.processes import Child, ProcessTree, first_ended
from cluster.progress import Progress, observe_progress
from cluster.serve_clock import CALLBACK, CALLBACK_VARIABLE
from cluster.serve_file import ServeFile, load_serve_file
from engine.guardian import start_guardian
from engine.model_cache import cache_dir
from engine.models import BUILT_IN

HOSTS = (ports.LOCALHOST, "localhost", "0.0.0.0")
WATCH_S = 5.0
"""How often to look whether an engine has ended, once the cluster is ready."""
POLL_S = 1.0
"""How often to look whether the cluster is ready; asking costs it a few milliseconds."""
REPEAT_S = 10.0
"""How long to be silent at most while the cluster starts."""
PLACED_WITHIN_S = 30.0
"""After this, replicas that fit no node are taken for ones that never will: nobody adds nodes."""
GRACE_S = 4.0
"""How long processes may take to end before they are killed. Serve's own shutdown takes over 30 s
(its proxy drains); who presses Ctrl-C does not want that."""
OBJECT_STORE_BYTES = 256 * 1024**2
"""Tokens and KV blocks never go through Ray's object store; its default is a third of the RAM."""
TAIL_LINES = 15
"""How much of a log or a traceback to show; its end says what went wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RayPorts:
    """Where our Ray and Serve listen, besides the API, each free when chosen."""

    gcs: int
    dashboard: int
    client: int
    fallback_proxy: int
    haproxy_metrics: int
    haproxy_stats: int

    @classmethod
    def choose(cls) -> "RayPorts":
        """The usual port of the dashboard if it is free; for the others any will do."""
        dashboard, gcs, client, fallback, metrics, stats = ports.pick_free([8265, *[None] * 5])
        return cls(
            gcs=gcs,
            dashboard=dashboard,
            client=client,
            fallback_proxy=fallback,
            haproxy_metrics=metrics,
            haproxy_stats=stats,
        )


def up(path: Path) -> None:
    """Serves a config until a signal ends it.

    Raises:
        ConfigError: the config is wrong; nothing was started.
        StartError: the cluster does not start, or has ended by itself; nothing of it is left.
    """
    began_s = time.monotonic()
    file = load_serve_file(path)
    _check_model_folder(file)
    _check_host(file)
    _check_port(file)
    log = _log_path(file)
    # Short: the paths of Ray's Unix sockets lie under it and may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="pdserve-", dir="/tmp"))
    _haproxy_folder(folder).mkdir(mode=0o700)
    try:
        with ProcessTree(log=log, grace_s=GRACE_S) as tree:
            start_guardian()  # Should this process be killed, what it starts from here on ends too.
            try:
                _serve(file, tree=tree, folder=folder, log=log, began_s=began_s)
            except KeyboardInterrupt:
                _say("stopping ...")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(_haproxy_folder(folder), ignore_errors=True)
    _say("stopped")


def _serve(file: ServeFile, *, tree: ProcessTree, folder: Path, log: Path, began_s: float) -> None:
    file = prepare_model(file, folder, _say)
    chosen = RayPorts.choose()
    dashboard_url = f"http://{ports.LOCALHOST}:{chosen.dashboard}"
    environment = _environment(chosen, folder, file)
    _say(f"starting Ray and Serve; log {log}, dashboard {dashboard_url}")
    ray = tree.start(_ray_command(chosen, folder), environment)
    if ray.wait() != 0:
        raise StartError(
            f"Ray does not start; the end of {log}:\n{_tail(log.read_text(errors='replace'))}"
        )
    members = [
        tree.start(_serve_command(chosen, file), environment),
        tree.inherited("raylet"),
        tree.inherited("gcs_server"),
    ]
    _await_ready(file, members=members, dashboard_url=dashboard_url, log=log, began_s=began_s)
    asked_s = time.monotonic()
    _await_answer(file, members=members, log=log)
    now_s = time.monotonic()
    _say(f"ready in {now_s - began_s:.0f} s; the first answers took {now_s - asked_s:.1f} s")
    _say(f"  API        {file.url}/v1")
    _say(f"  dashboard  {dashboard_url}")
    _say(f"  try        {_curl(file)}")
    told = Health()
    while (ended := first_ended(members, timeout_s=WATCH_S)) is None:
        tree.reap_orphans(known=members)
        key = file.config.router.api_key
        told = _tell_news(observe_health(file.url, timeout_s=WATCH_S, key=key), told)
    raise _has_ended(ended, log)


def _await_ready(
    file: ServeFile, *, members: Sequence[Child], dashboard_url: str, log: Path, began_s: float
) -> None:
    said: Progress | None = None
    said_s = began_s
    while not observe_health(file.url, timeout_s=5 * POLL_S).is_open:
        if ended := first_ended(members, timeout_s=POLL_S):
            raise _has_ended(ended, log)
        progress = observe_progress(dashboard_url, file.app_name, timeout_s=5 * POLL_S)
        if progress.failed:
            raise StartError(f"{progress.trouble or 'Serve has given up'}; the whole log is {log}")
        now_s = time.monotonic()
        if now_s - began_s > PLACED_WITHIN_S and (why := unplaceable(file.config, dashboard_url)):
            raise StartError(why)
        if progress != said or now_s - said_s > REPEAT_S:
            _say(f"{now_s - began_s:4.0f} s  {progress.summary}")
            if progress.trouble and (said is None or progress.trouble != said.trouble):
                _say(f"        {progress.trouble}")
            said, said_s = progress, now_s


def _await_answer(file: ServeFile, *, members: Sequence[Child], log: Path) -> None:
    """Ready means that it answers: a request has gone through the router and both engines."""
    said: Problem | None = None
    while True:
        answer = FirstAnswer(file)
        while not answer.is_done:
            if ended := first_ended(members, timeout_s=POLL_S / 10):
                raise _has_ended(ended, log)
        if (problem := answer.problem) is None:
            return
        if problem.is_refusal:
            _say(f"whether the engines answer was not seen; the first request got {problem.text}")
            return
        if problem != said:
            _say(f"the first request is not answered yet: {problem.text}")
            said = problem
        if ended := first_ended(members, timeout_s=POLL_S):
            raise _has_ended(ended, log)


def _tell_news(health: Health, told: Health) -> Health:
    """Says once how an engine has ended and what a replica failed of; returns what was told."""
    if health.ended_at_s > told.ended_at_s:
        _say(f"an engine has ended: {health.last_engine_end}")
        told = replace(told, ended_at_s=health.ended_at_s)
    if health.fault_at_s > told.fault_at_s:
        _say(f"a replica has failed: {health.last_fault}")
        told = replace(told, fault_at_s=health.fault_at_s)
    return told


def _has_ended(child: Child, log: Path) -> StartError:
    end = _tail(log.read_text(errors="replace"))
    return StartError(f"{child.name} has ended; the end of {log}:\n{end}")


def _check_model_folder(file: ServeFile) -> None:
    model = file.config.model
    if model.startswith(("/", "./", "../")) and not Path(model).is_dir():
        raise ConfigError(f"{file.path}: model: {model!r} is not a folder on this machine")


def _check_host(file: ServeFile) -> None:
    # Routers listen where the API does, and HAProxy looks for them at the node's address.
    if file.host not in HOSTS:
        raise ConfigError(
            f"{file.path}: http_options.host: {file.host} is not one of {', '.join(HOSTS)}, with "
            "which `pdserve up` works; on a cluster of your own use `serve run`"
        )


def _check_port(file: ServeFile) -> None:
    try:
        free = ports.is_free(file.port, host=file.host)
    except OSError as error:
        raise StartError(f"cannot listen on {file.host}:{file.port}: {error.strerror}") from None
    if not free:
        who = ports.owner(file.port)
        raise StartError(
            f"port {file.port} is in use{f' by {who}' if who else ''}; "
            "end that, or set http_options.port"
        )


def _log_path(file: ServeFile) -> Path:
    path = cache_dir() / f"serve-{file.port}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def _haproxy_folder(folder: Path) -> Path:
    """In memory: where a full disk does not take its config, Serve gives up, and HAProxy never
    hears of the router that took another's place."""
    return Path("/dev/shm", folder.name)


def _environment(chosen: RayPorts, folder: Path, file: ServeFile) -> dict[str, str]:
    inherited = {
        # Whatever Ray cluster this shell talks to, it is not the one we start.
        name: value
        for name, value in os.environ.items()
        if name not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS")
    }
    haproxy = _haproxy_folder(folder)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        CALLBACK_VARIABLE: CALLBACK,
        # On two busy cores the dashboard takes its time; Ray would rather fail after a minute.
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "180",
        # In spite of its name: 0 keeps Ray on the loopback interface, on Linux as well. Whoever
        # can reach a Ray cluster can run code on it.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # `ray start`'s own default, said outright: a token file that another cluster left in the
        # home folder would turn authentication on in Ray but not in what talks to it.
        "RAY_AUTH_MODE": "disabled",
        # By default these are the same for every cluster on a machine.
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(haproxy_command_path()),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "server-state"),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(chosen.fallback_proxy),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(chosen.haproxy_metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(chosen.haproxy_stats),
        "RAY_SERVE_HAPROXY_MAXCONN": str(file.config.router.max_connections),
        **inherited,
    }


def _ray_command(chosen: RayPorts, folder: Path) -> list[str]:
    return [
        _program("ray"),
        "start",
        "--head",
        f"--node-ip-address={ports.LOCALHOST}",
        f"--port={chosen.gcs}",
        f"--dashboard-port={chosen.dashboard}",
        f"--ray-client-server-port={chosen.client}",
        f"--temp-dir={folder}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        "--include-dashboard=true",
        "--disable-usage-stats",
    ]


def _serve_command(chosen: RayPorts, file: ServeFile) -> list[str]:
    address = f"{ports.LOCALHOST}:{chosen.gcs}"
    return [_program("serve"), "run", f"--address={address}", str(file.path)]


def _program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _curl(file: ServeFile) -> str:
    model, api = file.config.public_name, "completions"
    body: dict[str, object] = {"model": model, "prompt": "Once upon", "max_tokens": 32}
    built_in = BUILT_IN.get(file.config.model)
    if built_in is not None and built_in.question is not None:
        messages = [{"role": "user", "content": built_in.question}]
        api, body = "chat/completions", {"model": model, "messages": messages, "max_tokens": 60}
    headers = ["-H", "Content-Type: application/json"]
    if file.config.router.api_key is not None:
        headers += ["-H", "Authorization: Bearer YOUR_KEY"]
    return shlex.join(["curl", f"{file.url}/v1/{api}", *headers, "-d", json.dumps(body)])


def _tail(text: str) -> str:
    return "\n".join([line for line in text.splitlines() if line.strip()][-TAIL_LINES:])


def _say(line: str) -> None:
    print(line, flush=True)
