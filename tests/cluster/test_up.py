"""`pdserve up` where it must not start anything, and the ending of process trees."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster import ports
from cluster.cli import main
from cluster.serve_file import load_serve_file
from cluster.up import _curl

CONFIG = """\
http_options: {{host: 127.0.0.1, port: {port}}}
applications:
  - import_path: cluster.app:build
    args: {{model: {model}}}
"""

# Starts a shell that leaves an orphan, one that ignores SIGTERM.
SUPERVISOR = """\
import os, sys
from pathlib import Path
from cluster.processes import ProcessTree

folder = Path(sys.argv[1])
shell = f"(trap '' TERM; exec sleep 1000) & echo $! > {folder}/orphan"
with ProcessTree(log=folder / "log", grace_s=0.2) as tree:
    try:
        tree.start(["sh", "-c", shell], os.environ).wait()
        print("up", flush=True)
        tree.start(["sleep", "1000"], os.environ).wait()
    except KeyboardInterrupt:
        print("stopping", flush=True)
print("stopped", flush=True)
"""


# Starts an orphan in a session of its own, and a child, and is killed.
KILLED = """\
import os, sys
from pathlib import Path
from cluster.processes import ProcessTree
from engine.guardian import start_guardian

folder = Path(sys.argv[1])
shell = f"(trap '' TERM; exec setsid sleep 1000) & echo $! > {folder}/orphan"
with ProcessTree(log=folder / "log", grace_s=0.2) as tree:
    start_guardian()
    tree.start(["sh", "-c", shell], os.environ).wait()
    child = tree.start(["sleep", "1000"], os.environ)
    print(child.pid, flush=True)
    child.wait()
"""


def test_busy_port_is_named_with_its_owner(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        path.write_text(CONFIG.format(port=port, model="demo"))
        assert main(["up", str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"pdserve: port {port} is in use by ")
    assert f"process {os.getpid()}; end that, or set http_options.port" in err


def test_missing_model_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(port=8000, model="/no/such/folder"))
    assert main(["up", str(path)]) == 2
    line = f"pdserve: {path}: model: '/no/such/folder' is not a folder on this machine\n"
    assert capsys.readouterr().err == line


def test_a_host_at_which_the_proxy_finds_no_router(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    text = CONFIG.format(port=8000, model="demo").replace("127.0.0.1", "192.0.2.7")
    path.write_text(text)
    assert main(["up", str(path)]) == 2
    assert "http_options.host: 192.0.2.7 is not one of 127.0.0.1, " in capsys.readouterr().err


def test_the_printed_curl_says_where_the_key_goes(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    args = "{model: demo, router: {frontend: {api_key: secret}}}"
    path.write_text(CONFIG.format(port=8000, model="demo").replace("{model: demo}", args))
    curl = _curl(load_serve_file(path))
    assert "'Authorization: Bearer YOUR_KEY'" in curl
    assert "secret" not in curl


def test_free_ports_differ_and_avoid_a_taken_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        assert not ports.is_free(taken)
        chosen = ports.pick_free([taken, None, None])
    assert taken not in chosen
    assert len(set(chosen)) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_orphans_too(number: signal.Signals, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as supervisor:
        assert supervisor.stdout is not None
        assert supervisor.stdout.readline() == "up\n"
        orphan = psutil.Process(int((tmp_path / "orphan").read_text()))
        assert orphan.ppid() == supervisor.pid
        supervisor.send_signal(number)
        assert supervisor.stdout.read() == "stopping\nstopped\n"
    assert supervisor.returncode == 0
    assert not orphan.is_running()


def test_a_kill_ends_what_was_started_too(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as command:
        assert command.stdout is not None
        child = psutil.Process(int(command.stdout.readline()))
        orphan = psutil.Process(int((tmp_path / "orphan").read_text()))
        command.kill()
    _, alive = psutil.wait_procs([child, orphan], timeout=60)
    # Where nobody collects the ended, they stay as zombies.
    assert [each for each in alive if each.status() != psutil.STATUS_ZOMBIE] == []


# In place of Ray's commands: what it leaves running, and nothing that ever gets ready.
# As Ray's, it ends when what it has started runs: a fork has its parent's name at first.
RAY = """\
#!/bin/sh
for name in raylet gcs_server; do
    "$(dirname "$0")/$name" 1000 &
    until [ "$(cat /proc/$!/comm)" = "$name" ]; do :; done
done
"""
SERVE = """\
#!/bin/sh
touch "$(dirname "$0")/started"
exec sleep 1000
"""


def test_a_killed_command_leaves_nothing_of_its_cluster(tmp_path: Path) -> None:
    (tmp_path / "python").symlink_to(sys.executable)
    sleep = shutil.which("sleep")
    assert sleep is not None
    for name in ("raylet", "gcs_server"):
        shutil.copy(sleep, tmp_path / name)
    for name, text in (("ray", RAY), ("serve", SERVE)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (port,) = ports.pick_free([None])
    (tmp_path / "config.yaml").write_text(CONFIG.format(port=port, model="demo"))
    with subprocess.Popen(
        [str(tmp_path / "python"), "-m", "cluster.cli", "up", str(tmp_path / "config.yaml")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        stdout=subprocess.DEVNULL,
    ) as command:
        process = psutil.Process(command.pid)
        deadline_s = time.monotonic() + 120
        while not (tmp_path / "started").exists():
            assert command.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        theirs = process.children(recursive=True)
        assert {"raylet", "gcs_server", "sleep"} <= {each.name() for each in theirs}
        command.kill()
    _, alive = psutil.wait_procs(theirs, timeout=60)
    assert [each for each in alive if each.status() != psutil.STATUS_ZOMBIE] == []
