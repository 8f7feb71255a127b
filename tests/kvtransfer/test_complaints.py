"""What is logged of strangers, who may come as often as they like."""

import asyncio
import contextlib
import logging

import pytest

from engine.channel import listen
from kvtransfer.complaints import INTERVAL_S, MAX_ADDRESSES, Complaints
from kvtransfer.greeting import ServerGreeting
from kvtransfer.listener import Listener


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_one_address_gets_a_line_in_a_while_with_the_number_of_the_rest() -> None:
    clock = Clock()
    complaints = Complaints(clock)
    assert complaints.line("a", "no member") == "a: no member"
    assert [complaints.line("a", "no member") for _ in range(999)] == [None] * 999
    assert complaints.line("b", "no member") == "b: no member", "others are told of"
    clock.now_s += INTERVAL_S
    again = "a: no member (and 999 more from a since the last line)"
    assert complaints.line("a", "no member") == again
    clock.now_s += INTERVAL_S
    assert complaints.line("a", "no member") == "a: no member"


def test_many_addresses_get_few_lines_and_little_memory() -> None:
    clock = Clock()
    complaints = Complaints(clock)
    for _ in range(3):
        lines = [complaints.line(f"a{number}", "no member") for number in range(1000)]
        assert MAX_ADDRESSES <= sum(line is not None for line in lines) <= MAX_ADDRESSES + 1
        assert len(complaints._told) <= MAX_ADDRESSES + 1
        clock.now_s += INTERVAL_S


async def test_who_connects_to_a_replica_in_a_loop_fills_no_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server, port = await listen("127.0.0.1", "secret", NoReplica())  # type: ignore[arg-type]
    for _ in range(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n" * 300)
        with contextlib.suppress(ConnectionResetError):
            await reader.read(-1)
        writer.close()
    server.close()
    await server.wait_closed()
    assert len(caplog.records) == 1


class NoReplica:
    """Has nothing but a name."""

    engine_id = "replica"

    def facts(self) -> "NoReplica":
        return self


async def test_who_connects_to_the_side_channel_in_a_loop_fills_no_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    listener = Listener(
        "127.0.0.1",
        lambda: ServerGreeting("p", secret="secret", purpose="test", version=1),
        lambda _: None,
        name="test",
        tls=None,
    )
    for _ in range(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n" * 300)
        with contextlib.suppress(ConnectionResetError):
            await reader.read(-1)
        writer.close()
    await asyncio.to_thread(listener.stop)
    assert len(caplog.records) == 1
