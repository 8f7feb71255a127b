"""Connections between two live processes are cut and black-holed from outside."""

import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import pytest

from benchmarks.chaos_network import Link

_CHILD = """
import socket, sys
here = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
print("connected", flush=True)
while said := here.recv(100):
    print(said.decode(), flush=True)
print("ended", flush=True)
"""


@dataclass
class Peer:
    """Another process with a connection to this one, which prints what arrives."""

    pid: int
    here: socket.socket
    output: IO[str]

    def prints(self) -> str:
        return self.output.readline().strip()


@pytest.fixture
def peer() -> Iterator[Peer]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        command = [sys.executable, "-c", _CHILD, str(listening.getsockname()[1])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            here, _ = listening.accept()
            assert child.stdout is not None
            with here:
                peer = Peer(child.pid, here, child.stdout)
                assert peer.prints() == "connected"
                yield peer
            child.kill()


def test_a_cut_ends_it_for_both(peer: Peer) -> None:
    link = Link(os.getpid(), peer.pid)
    assert link.num_connections == 1
    link.cut()
    link.close()
    assert peer.prints() == "ended"
    assert peer.here.recv(1) == b""


def test_in_a_black_hole_nothing_arrives_until_it_is_lifted(peer: Peer) -> None:
    link = Link(os.getpid(), peer.pid)
    link.black_hole()
    peer.here.sendall(b"one")
    peer.here.settimeout(0.2)
    with pytest.raises(TimeoutError):
        peer.here.recv(1)
    assert select.select([peer.output], [], [], 0) == ([], [], [])
    link.close()
    assert peer.prints() == "one"


def test_a_process_that_is_gone_has_no_link() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    with pytest.raises(ProcessLookupError):
        Link(os.getpid(), child.pid)
