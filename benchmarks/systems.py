"""The systems that are compared: how each is started, and how nothing of it stays behind.

Owns their commands and environments, and every process that descends from them. Never measures.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import yaml

from engine.models import resolve_model

CPU_WORKER = "engine.cpu_worker.CPUWorker"
"""engine.arguments has it too, and imports vLLM, which takes seconds."""
MAX_MODEL_LEN = 4096
SERVED_NAME = "demo"

# What a vLLM engine needs on a small machine without a GPU; what pdserve sets for its own engines.
_ENGINE_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
_ROOT = Path(__file__).resolve().parent.parent
_CONFIGS = Path("cluster", "configs")
_STOP_TIMEOUT_S = 45.0
_PR_SET_CHILD_SUBREAPER = 36


class SystemFailedError(RuntimeError):
    """A system could not be started, or ended by itself; the text holds the end of its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One system's command, what it adds to the environment, and where it will listen."""

    command: tuple[str, ...]
    port: int
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningSystem:
    """A started system. `process` leads it; its other processes descend from this one."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def log_tail(self) -> str:
        """The end of what it printed."""
        return self.log.read_text(errors="replace")[-3000:]

    def check_alive(self) -> None:
        """Raises SystemFailedError if the leading process has ended."""
        if self.process.poll() is not None:
            status = self.process.returncode
            raise SystemFailedError(f"it ended with status {status}:\n{self.log_tail()}")


def launch_vllm(folder: Path, config: Path) -> Launch:
    """One vLLM server, as shipped but for the permission that its AMX kernels need."""
    port = _free_port()
    command = (
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", resolve_model("demo"), "--served-model-name", SERVED_NAME),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--max-model-len", str(MAX_MODEL_LEN), "--enforce-eager"),
        # On a processor with AMX its first bfloat16 request would end it.
        *("--worker-cls", CPU_WORKER),
        "--disable-uvicorn-access-log",
    )
    return Launch(command=command, port=port, environment=_ENGINE_ENVIRONMENT)


def launch_ray_llm(folder: Path, config: Path) -> Launch:
    """Ray Serve LLM's prefill/decode app, as shipped."""
    port = _free_port()
    command = (
        *(sys.executable, "-m", "benchmarks.ray_llm"),
        *("--model", resolve_model("demo"), "--served-name", SERVED_NAME),
        *("--port", str(port), "--max-model-len", str(MAX_MODEL_LEN)),
        *("--temp-dir", str(folder)),
    )
    return Launch(command=command, port=port, environment=_ENGINE_ENVIRONMENT)


def launch_ray_llm_tuned(folder: Path, config: Path) -> Launch:
    """The same with everything its documentation offers for latency, and NIXL that waits."""
    shipped = launch_ray_llm(folder, config)
    return Launch(
        command=(*shipped.command, "--tuned"),
        port=shipped.port,
        environment={
            **shipped.environment,
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1",
            # By default these lie in a folder that all of a machine's clusters share.
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy" / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "haproxy" / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder / "haproxy"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "haproxy" / "server-state"),
        },
    )


def launch_pdserve(folder: Path, config: Path) -> Launch:
    """This project, the way a user starts it."""
    command = (str(Path(sys.executable).with_name("pdserve")), "up", str(config))
    options = yaml.safe_load(config.read_text()).get("http_options", {})
    return Launch(command=command, port=options.get("port", 8000))


def launch_pdserve_split(folder: Path, config: Path) -> Launch:
    """The same with every prompt read by prefill and every block moved by NIXL."""
    return launch_pdserve(folder, _ROOT / _CONFIGS / "tiny.yaml")


def launch_checkout(folder: Path, config: Path, *, checkout: Path) -> Launch:
    """Another checkout of this project with its own config, and with this one's dependencies."""
    tiny, demo = (checkout / _CONFIGS / name for name in ("tiny.yaml", "demo.yaml"))
    # Before there was a tiny.yaml, the demo had the tiny model.
    launch = launch_pdserve(folder, tiny if tiny.exists() else demo)
    return replace(launch, environment={"PYTHONPATH": str(checkout)})


Launcher = Callable[[Path, Path], Launch]
"""From a folder for its files and pdserve's config, how a system is to be started."""

SYSTEMS: Mapping[str, Launcher] = {
    "vllm": launch_vllm,
    "ray-llm": launch_ray_llm,
    "ray-llm-tuned": launch_ray_llm_tuned,
    "pdserve": launch_pdserve,
    "pdserve-split": launch_pdserve_split,
}


def adopt_orphans() -> None:
    """Makes this process the parent of every orphan among its descendants (Linux).

    Engines, HAProxy and Ray's daemons leave their parents; this way they can still be found. To
    find them it must live on, so SIGTERM becomes a KeyboardInterrupt as SIGINT is; and SIGINT is
    one even where a shell's background job is told to ignore it.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextmanager
def started(launcher: Launcher, config: Path) -> Iterator[RunningSystem]:
    """Starts a system and, at the end, stops it with all that it started.

    It does not wait until the system is ready. Needs `adopt_orphans` before.

    Raises:
        SystemFailedError: somebody else holds its port.
    """
    # Short, because Ray puts sockets under it, and their paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        launch = launcher(Path(folder), config)
        if _is_listening(launch.port):
            raise SystemFailedError(f"port {launch.port} is taken: stop what listens there")
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                launch.command,
                env={**_clean_environment(), **launch.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield RunningSystem(url=f"http://127.0.0.1:{launch.port}/v1", process=process, log=log)
        finally:
            # A second Ctrl-C must not leave half of it running.
            interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
            _stop(process)
            signal.signal(signal.SIGINT, interrupt)


def used_cpu_s() -> float:
    """CPU seconds that the processes now running under this one have used, without this one."""
    total_s = 0.0
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total_s += times.user + times.system
    return total_s


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    # A dying process may start another: look until there is none.
    while left := psutil.Process().children(recursive=True):
        for child in left:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(left, timeout=5)


def _clean_environment() -> dict[str, str]:
    """This process's environment without settings for somebody else's Ray."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, [environment.get("PYTHONPATH")])]
    return environment | {"PYTHONPATH": os.pathsep.join(paths), "RAY_USAGE_STATS_ENABLED": "0"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
