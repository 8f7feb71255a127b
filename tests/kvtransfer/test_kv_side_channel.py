"""The side channel answers whom it knows, ignores whom it does not, and never shares a port."""

from collections.abc import Iterator

import msgspec
import pytest
import zmq

from kvtransfer.side_channel import ReservedPort, SideChannel

PAYLOADS = {(0, 0): b"rank zero", (0, 1): b"rank one"}


@pytest.fixture
def side_channel() -> Iterator[SideChannel]:
    channel = SideChannel("127.0.0.1", PAYLOADS)
    yield channel
    channel.stop()


def ask(port: int, *queries: bytes) -> list[bytes]:
    """The answer to the last of these queries."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVTIMEO, 5000)
        socket.connect(f"tcp://127.0.0.1:{port}")
        for query in queries:
            socket.send_multipart([b"", query])
        return socket.recv_multipart()[1:]


@pytest.mark.parametrize("rank", PAYLOADS)
def test_each_rank_has_its_payload(side_channel: SideChannel, rank: tuple[int, int]) -> None:
    payload, clock = ask(side_channel.port, msgspec.msgpack.encode(("query", *rank)))
    assert payload == PAYLOADS[rank]
    assert isinstance(msgspec.msgpack.decode(clock), float)


@pytest.mark.parametrize(
    "query",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xc1", id="no msgpack"),
        pytest.param(msgspec.msgpack.encode(7), id="no triple"),
        pytest.param(msgspec.msgpack.encode(("query", 5, 5)), id="no such rank"),
        pytest.param(msgspec.msgpack.encode(("query", [], {})), id="no rank"),
    ],
)
def test_a_stranger_ends_nothing(side_channel: SideChannel, query: bytes) -> None:
    payload, _ = ask(side_channel.port, query, msgspec.msgpack.encode(("query", 0, 1)))
    assert payload == PAYLOADS[0, 1]


def test_two_on_one_host_have_two_ports(side_channel: SideChannel) -> None:
    other = SideChannel("127.0.0.1", PAYLOADS)
    assert other.port != side_channel.port
    other.stop()


def test_a_reserved_port_is_the_channels() -> None:
    with ReservedPort("127.0.0.1") as reserved, ReservedPort("127.0.0.1") as other:
        assert reserved.port != other.port
        channel = SideChannel("127.0.0.1", PAYLOADS, reserved.port)
        payload, _ = ask(reserved.port, msgspec.msgpack.encode(("query", 0, 1)))
        assert payload == PAYLOADS[0, 1]
        channel.stop()
