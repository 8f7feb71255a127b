"""The side channel answers members, ends for nobody, and never shares a port."""

import contextlib
import os
import random
import resource
import socket
import time
from collections.abc import Iterator

import msgspec
import pytest

from kvtransfer.errors import GreetingFailed, PeerTimeout, PeerUnreachable
from kvtransfer.greeting import ClientGreeting, greet
from kvtransfer.side_channel import PURPOSE, VERSION, Answer, Rank, ReservedPort, SideChannel, ask

HOST = "127.0.0.1"
PAYLOADS = {(0, 0): b"rank zero", (0, 1): b"rank one" * 100_000}


def new_channel(port: int | None = None, engine_id: str = "e") -> SideChannel:
    return SideChannel(HOST, PAYLOADS, port, engine_id=engine_id, secret="s")


@pytest.fixture
def side_channel() -> Iterator[SideChannel]:
    channel = new_channel()
    yield channel
    channel.stop()


def ask_rank(port: int, rank: Rank = (0, 0), engine_id: str = "e", secret: str = "s") -> Answer:
    return ask(HOST, port, [rank], engine_id=engine_id, secret=secret)[rank]


def member(port: int) -> socket.socket:
    """A connection that has greeted."""
    sock = socket.create_connection((HOST, port))
    greet(sock, ClientGreeting("d", "e", secret="s", purpose=PURPOSE, version=VERSION), timeout_s=5)
    return sock


def test_each_rank_has_its_payload(side_channel: SideChannel) -> None:
    answers = ask(HOST, side_channel.port, PAYLOADS, engine_id="e", secret="s")
    assert {rank: answer.payload for rank, answer in answers.items()} == PAYLOADS
    # Here both sides have one clock.
    assert all(abs(answer.clock_offset_s) <= answer.round_trip_s for answer in answers.values())


def test_a_rank_that_is_not_there_is_named(side_channel: SideChannel) -> None:
    with pytest.raises(PeerUnreachable, match=r"no rank \(5, 5\)"):
        ask_rank(side_channel.port, (5, 5))


def test_who_does_not_know_the_secret_gets_nothing(side_channel: SideChannel) -> None:
    with pytest.raises(GreetingFailed, match="does not know this application's secret"):
        ask_rank(side_channel.port, secret="guessed")


def test_an_engine_that_took_the_address_over_says_who_it_is(side_channel: SideChannel) -> None:
    with pytest.raises(GreetingFailed, match="this is e, not the one before"):
        ask_rank(side_channel.port, engine_id="the one before")


@pytest.mark.parametrize("seed", range(20))
def test_no_bytes_end_it(side_channel: SideChannel, seed: int) -> None:
    rng = random.Random(seed)
    noise = [b"", b"\xff" * 5000, b"GET / HTTP/1.1\r\n\r\n", rng.randbytes(rng.randrange(1, 9000))]
    for greeted in (False, True):
        for some in noise:
            with (
                member(side_channel.port)
                if greeted
                else socket.create_connection((HOST, side_channel.port))
            ) as sock:
                sock.sendall(some)
    assert ask_rank(side_channel.port).payload == b"rank zero"


@pytest.mark.parametrize(
    "question",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xc1", id="no msgpack"),
        pytest.param(msgspec.msgpack.encode(7), id="no pair"),
        pytest.param(msgspec.msgpack.encode(([], {})), id="no rank"),
        pytest.param(b"x" * 1000, id="too long"),
    ],
)
def test_what_is_no_question_ends_its_connection_only(
    side_channel: SideChannel, question: bytes
) -> None:
    with member(side_channel.port) as asking, member(side_channel.port) as other:
        asking.sendall(len(question).to_bytes(4, "big") + question)
        asking.settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert asking.recv(1) == b""
        asked = msgspec.msgpack.encode((0, 0))
        other.sendall(len(asked).to_bytes(4, "big") + asked)
        other.settimeout(5)
        assert other.recv(1) != b""


def test_strangers_that_say_nothing_keep_no_member_out(side_channel: SideChannel) -> None:
    strangers = [socket.create_connection((HOST, side_channel.port)) for _ in range(200)]
    assert ask_rank(side_channel.port).payload == b"rank zero"
    for stranger in strangers:
        stranger.close()


def test_a_peer_that_hangs_is_given_up() -> None:
    with socket.create_server((HOST, 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(PeerTimeout):
            ask(HOST, port, [(0, 0)], engine_id="e", secret="s", timeout_s=0.1)
    with pytest.raises(PeerUnreachable, match="no KV engine listens"):
        ask_rank(port)


def test_it_listens_at_its_address_only(side_channel: SideChannel) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", side_channel.port))


def test_its_end_ends_its_connections() -> None:
    channel = new_channel()
    with member(channel.port) as sock:
        channel.stop()
        sock.settimeout(5)
        assert sock.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, channel.port))


def test_it_waits_while_there_are_no_files_left(side_channel: SideChannel) -> None:
    # A connection that nobody can accept is accepted once somebody can.
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as sock:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")), limits[1]))
        try:
            sock.connect((HOST, side_channel.port))
            time.sleep(0.05)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert ask_rank(side_channel.port).payload == b"rank zero"


def test_two_on_one_host_have_two_ports(side_channel: SideChannel) -> None:
    other = new_channel()
    assert other.port != side_channel.port
    other.stop()


def test_a_reserved_port_is_the_channels() -> None:
    with ReservedPort(HOST) as reserved, ReservedPort(HOST) as other:
        assert reserved.port != other.port
        channel = new_channel(reserved.port)
        assert ask_rank(reserved.port).payload == PAYLOADS[0, 0]
        channel.stop()
