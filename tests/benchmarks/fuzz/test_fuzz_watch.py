"""Which processes are watched, and when one has ended."""

import subprocess
import sys

import psutil
import pytest

from benchmarks.fuzz.watch import Listener, Watch, label

TITLED = """
import setproctitle, socket, sys
server = socket.create_server(("127.0.0.1", 0))
setproctitle.setproctitle("VLLM::Sleeper")
print(server.getsockname()[1], flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("ray::ServeReplica:pdserve:router", "router"),
        ("ray::ServeReplica:pdserve:decode.initialize_and_get_metadata", "decode"),
        ("VLLM::EngineCore", "VLLM::EngineCore"),
        ("VLLM::Worker_TP0 x", "VLLM::Worker_TP0"),
        ("/venv/bin/haproxy -dS -db -f /tmp/haproxy.cfg", "HAProxy"),
        ("ray::HAProxyManager", None),
        ("ray::ServeController", None),
        ("", None),
    ],
)
def test_labels(command: str, expected: str | None) -> None:
    assert label(command) == expected


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("::", "::1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("fe80::1", "fe80::1"),
    ],
)
def test_where_a_listener_is_reached(address: str, host: str) -> None:
    assert Listener(port=1, address=address, process="a server").host == host


def test_a_process_is_seen_to_listen_and_to_end() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", TITLED], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        watch = Watch(psutil.Process())
        assert [each.port for each in watch.listeners()] == [port]
        assert watch.ended() == []
        process.kill()
        process.wait()
        assert watch.ended() == [("VLLM::Sleeper", process.pid)]
        assert watch.ended() == []
