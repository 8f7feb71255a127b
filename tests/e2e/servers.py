"""The servers of the end-to-end tests: a real cluster, and one plain vLLM server to compare with.

Owns their processes from start to end. What is asked of them is the business of the tests.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from cluster.app import CPU_ENGINE_ENV
from cluster.ports import LOCALHOST, pick_free
from cluster.serve_file import load_serve_file
from engine.models import resolve_model

CONFIG = Path(__file__).parent / "cluster.yaml"
MODEL = "demo"
MAX_MODEL_LEN = 512
BLOCK_SIZE = 32
PREFILL, DECODE = "prefill", "decode"

START_TIMEOUT_S = 900.0
"""Far more than a start takes: a machine may be slow, and others may use it."""
STOP_TIMEOUT_S = 30.0
TAIL_LINES = 30
ANSWER_TIMEOUT_S = 900.0
"""Far more than an answer takes, on a slow machine that others use as well."""
KEEP_ALIVE_S = 2.0
"""Well below the five seconds after which servers close a connection that nothing comes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A running OpenAI server and the process that owns all of its processes."""

    url: str
    process: psutil.Process
    log: Path

    def processes(self, name: str) -> list[psutil.Process]:
        """Its processes, direct or not, whose command line contains `name`."""
        return descendants(self.process, name)


def descendants(leader: psutil.Process, name: str) -> list[psutil.Process]:
    """All that a process has started, directly or not, whose command line contains `name`."""
    found = []
    for process in leader.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


class Servers(contextlib.ExitStack):
    """The cluster and the plain server. Owns both from start to end; their logs go to `folder`."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __enter__(self) -> "Servers":
        """Starts them side by side and waits for neither."""
        with contextlib.ExitStack() as stack:
            # This one first: it sees to the demo model, which both would otherwise do at once.
            self._plain = stack.enter_context(plain_server(self._folder / "plain.log"))
            self._cluster = stack.enter_context(_cluster(self._folder / "cluster.log"))
            self.push(stack.pop_all())
        return self

    def ready(self) -> tuple[Server, Server]:
        """The cluster and the plain server, once they can be asked.

        Raises:
            RuntimeError: one of them does not start; with the end of what it says.
        """
        # The last line of what it says when it is ready: tests read those before it.
        await_line(self._cluster, "  try  ")
        await_line(self._plain, "Application startup complete")
        return self._cluster, self._plain

    def end_soon(self) -> None:
        """Tells both to end; leaving the context waits for it."""
        for server in (self._cluster, self._plain):
            with contextlib.suppress(psutil.NoSuchProcess):
                server.process.send_signal(signal.SIGINT)


def _cluster(log: Path) -> contextlib.AbstractContextManager[Server]:
    command = [str(Path(sys.executable).parent / "pdserve"), "up", str(CONFIG)]
    # Every ten seconds by default; tests need not wait so long.
    env = {"RAY_metrics_report_interval_ms": "1000"}
    return started(command, load_serve_file(CONFIG).url, env, log)


def plain_server(log: Path) -> contextlib.AbstractContextManager[Server]:
    (port,) = pick_free([None])
    command = plain_command(
        MODEL,
        *("--dtype", "float32"),
        *("--block-size", str(BLOCK_SIZE)),
        *("--max-model-len", str(MAX_MODEL_LEN)),
        *("--tool-call-parser", "hermes"),
        "--enable-auto-tool-choice",
        "--enable-scale-out",
        port=port,
    )
    return started(command, f"http://{LOCALHOST}:{port}", plain_environment(), log)


def plain_command(model: str, *options: str, port: int) -> list[str]:
    """One vLLM server's, for a built-in model under its own name."""
    return [
        sys.executable,
        *("-m", "vllm.entrypoints.openai.api_server"),
        *("--model", resolve_model(model)),
        *("--served-model-name", model),
        *("--host", LOCALHOST),
        *("--port", str(port)),
        "--enforce-eager",
        *options,
    ]


def plain_environment() -> dict[str, str]:
    """As the cluster's replicas have it on a CPU."""
    return {"VLLM_CPU_KVCACHE_SPACE": "1"} | CPU_ENGINE_ENV


@contextlib.contextmanager
def started(
    command: Sequence[str], url: str, env: Mapping[str, str], log: Path
) -> Iterator[Server]:
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            env=os.environ | env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # A Ctrl-C in the terminal is pytest's, which then ends this one in its own time.
            start_new_session=True,
        )
    process = psutil.Process(child.pid)
    try:
        yield Server(url=url, process=process, log=log)
    finally:
        descendants = process.children(recursive=True) if child.poll() is None else []
        child.send_signal(signal.SIGINT)
        try:
            child.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        for left in psutil.wait_procs(descendants, timeout=5)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()


def await_line(server: Server, line: str) -> None:
    """Waits for a line in the log. A port that answers might be another server's."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while line not in (output := server.log.read_text(errors="replace")):
        ended = not server.process.is_running() or server.process.status() == psutil.STATUS_ZOMBIE
        if ended or time.monotonic() > deadline_s:
            tail = "\n".join(output.splitlines()[-TAIL_LINES:])
            raise RuntimeError(f"{server.url} does not start; its output ends so:\n{tail}")
        time.sleep(0.5)


def new_client() -> httpx.AsyncClient:
    """A client that asks as much at once as a test likes."""
    limits = httpx.Limits(max_connections=None, keepalive_expiry=KEEP_ALIVE_S)
    return httpx.AsyncClient(timeout=ANSWER_TIMEOUT_S, limits=limits, verify=False)
