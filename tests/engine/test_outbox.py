"""What waits to be sent: in order, in pieces, for as long as the other side takes some of it."""

import asyncio
import random
from typing import Any, cast

import pytest

from engine.outbox import DRAINED_BYTES, PIECE_BYTES, TURN_BYTES, Outbox

STALL_S = 10.0


class FakeTransport:
    """A kernel that takes what the test lets it."""

    def __init__(self) -> None:
        self.outbox: Outbox | None = None
        self.buffer = bytearray()
        self.taken = bytearray()
        self.writes: list[int] = []
        self.high = self.low = 0
        self.is_open = True

    def set_write_buffer_limits(self, high: int, low: int) -> None:
        self.high, self.low = high, low

    def get_write_buffer_size(self) -> int:
        return len(self.buffer)

    def is_closing(self) -> bool:
        return not self.is_open

    def close(self) -> None:
        self.is_open = False

    def write(self, piece: Any) -> None:
        was_below = len(self.buffer) <= self.high
        self.buffer += piece
        self.writes.append(len(piece))
        if was_below and len(self.buffer) > self.high:
            assert self.outbox is not None
            self.outbox.pause()

    def take(self, num_bytes: int) -> None:
        was_above = len(self.buffer) > self.low
        self.taken += self.buffer[:num_bytes]
        del self.buffer[:num_bytes]
        if was_above and len(self.buffer) <= self.low:
            assert self.outbox is not None
            self.outbox.resume()


def new_outbox() -> tuple[Outbox, FakeTransport, list[str]]:
    transport, stalls = FakeTransport(), list[str]()
    outbox = Outbox(
        cast(asyncio.Transport, transport),
        stall_timeout_s=STALL_S,
        stalled=lambda: stalls.append("stalled"),
    )
    transport.outbox = outbox
    return outbox, transport, stalls


def put(outbox: Outbox, *pieces: bytes) -> None:
    outbox.put([memoryview(piece) for piece in pieces])


async def take_all(outbox: Outbox, transport: FakeTransport) -> None:
    while outbox.num_pending:
        transport.take(100_000)
        await asyncio.sleep(0)


@pytest.mark.parametrize("seed", range(20))
async def test_all_is_sent_in_its_order(seed: int) -> None:
    rng = random.Random(seed)
    outbox, transport, _ = new_outbox()
    sent = bytearray()
    for _ in range(rng.randrange(1, 40)):
        sizes = rng.choices([1, 50, PIECE_BYTES, PIECE_BYTES + 1, 700_000], [9, 9, 1, 1, 1], k=3)
        pieces = [rng.randbytes(size) for size in sizes]
        put(outbox, *pieces)
        sent += b"".join(pieces)
        if rng.random() < 0.5:
            transport.take(rng.randrange(1_000_000))
        assert len(transport.taken) + outbox.num_pending == len(sent)
    await take_all(outbox, transport)
    assert transport.taken == sent
    outbox.end()


async def test_what_is_small_is_written_at_once_and_together() -> None:
    outbox, transport, _ = new_outbox()
    put(outbox, b"a" * 100, b"b" * 100)
    assert transport.writes == [200]
    outbox.end()


async def test_what_is_large_goes_in_pieces_and_others_have_their_turn() -> None:
    outbox, transport, _ = new_outbox()
    transport.high = 1 << 40  # A kernel that takes all.
    put(outbox, bytes(5 * TURN_BYTES))
    assert max(transport.writes) <= PIECE_BYTES
    assert sum(transport.writes) == TURN_BYTES
    for turn in range(2, 6):
        await asyncio.sleep(0)
        assert sum(transport.writes) == turn * TURN_BYTES
    outbox.end()


async def test_many_small_ones_that_waited_are_joined() -> None:
    outbox, transport, _ = new_outbox()
    put(outbox, bytes(4 * PIECE_BYTES))
    for _ in range(1000):
        put(outbox, b"small")
    await take_all(outbox, transport)
    assert len(transport.writes) < 10
    outbox.end()


async def test_who_makes_much_waits_until_little_is_pending() -> None:
    outbox, transport, _ = new_outbox()
    await outbox.drained()
    put(outbox, bytes(DRAINED_BYTES + 1_000_000))
    waiting = [asyncio.create_task(outbox.drained()) for _ in range(2)]
    transport.take(500_000)
    await asyncio.sleep(0)
    assert not outbox.is_drained
    assert not any(task.done() for task in waiting)
    transport.take(700_000)
    while outbox.num_pending > DRAINED_BYTES // 2:
        transport.take(100_000)
    await asyncio.gather(*waiting)
    outbox.end()


async def test_the_end_of_the_connection_ends_the_waiting() -> None:
    outbox, _, _ = new_outbox()
    put(outbox, bytes(2 * DRAINED_BYTES))
    waiting = asyncio.create_task(outbox.drained())
    await asyncio.sleep(0)
    outbox.end()
    await waiting
    put(outbox, b"into the void")
    await outbox.drained()


async def test_it_closes_once_all_is_written() -> None:
    outbox, transport, _ = new_outbox()
    put(outbox, bytes(10 * PIECE_BYTES))
    outbox.close()
    put(outbox, b"too late")
    assert transport.is_open
    await take_all(outbox, transport)
    assert not transport.is_open
    assert len(transport.taken) == 10 * PIECE_BYTES
    outbox.end()


async def test_who_takes_nothing_has_stalled_and_who_takes_little_has_not() -> None:
    outbox, transport, stalls = new_outbox()
    put(outbox, bytes(10 * PIECE_BYTES))
    watch = outbox._watch
    assert watch is not None
    for _ in range(3):
        transport.take(1)
        fire(outbox)
        assert stalls == []
    fire(outbox)
    assert stalls == ["stalled"]
    outbox.end()


async def test_an_idle_connection_has_not_stalled() -> None:
    outbox, transport, stalls = new_outbox()
    put(outbox, b"a")
    transport.take(1)
    fire(outbox)
    assert outbox._watch is None
    assert stalls == []
    outbox.end()


def fire(outbox: Outbox) -> None:
    """The time that a stall takes has passed."""
    assert outbox._watch is not None
    call, arguments = outbox._watch._callback, outbox._watch._args  # type: ignore[attr-defined]
    outbox._watch.cancel()
    call(*arguments)
