"""What is on its way to the other side of a connection, written as the other side takes it.

Owns the bytes that the transport has not been given yet, and the waiting for them. A large message
goes in pieces, so that it neither is copied nor holds up the event loop; nothing is dropped because
much is pending. Whoever makes much waits for `drained`.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

PIECE_BYTES = 128 * 1024
"""At most so much is given to the transport at once."""

TURN_BYTES = 1024 * 1024
"""And so much before others have their turn in the event loop."""

DRAINED_BYTES = 4 * 1024 * 1024
"""With less pending, whoever makes more need not wait."""


class Outbox:
    """The sending half of one connection. Used from its event loop.

    `stalled` is called where the other side has taken nothing for `stall_timeout_s`, or at most
    twice that, of what is pending.
    """

    def __init__(
        self, transport: asyncio.Transport, *, stall_timeout_s: float, stalled: Callable[[], None]
    ) -> None:
        self._transport = transport
        self._stall_timeout_s, self._stalled = stall_timeout_s, stalled
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[memoryview] = deque()
        self._num_waiting = 0
        """Bytes of `_waiting`."""
        self._num_given = 0
        """Bytes that the transport was ever given."""
        self._is_paused = False
        self._turn: asyncio.Handle | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self.is_closing = False
        self._has_ended = False
        transport.set_write_buffer_limits(high=2 * PIECE_BYTES, low=PIECE_BYTES // 2)

    @property
    def num_pending(self) -> int:
        """Bytes that the kernel has not taken yet."""
        return self._num_waiting + self._transport.get_write_buffer_size()

    @property
    def is_drained(self) -> bool:
        return self._has_ended or self.num_pending < DRAINED_BYTES

    def put(self, pieces: Sequence[memoryview]) -> None:
        """Queues a message as a whole. Its memory must not change until it is sent."""
        if self._has_ended or self.is_closing:
            return
        num_bytes = sum(piece.nbytes for piece in pieces)
        if not self._waiting and not self._is_paused and num_bytes <= PIECE_BYTES:
            self._give(b"".join(pieces))
        else:
            self._waiting.extend(pieces)
            self._num_waiting += num_bytes
            self._write()
        if self._watch is None and self.num_pending:
            self._watch_from(self._num_taken)

    def close(self) -> None:
        """Closes the connection once what was put is on its way."""
        self.is_closing = True
        if not self._waiting:
            self._transport.close()

    async def drained(self) -> None:
        """Returns once little is pending, or the connection has ended."""
        while not self.is_drained:
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._waiters.append(waiter)
            await waiter

    # What the transport says.

    def pause(self) -> None:
        self._is_paused = True

    def resume(self) -> None:
        self._is_paused = False
        self._write()

    def end(self) -> None:
        """The connection has ended: what is pending is dropped."""
        self._has_ended = True
        self._waiting.clear()
        self._num_waiting = 0
        for handle in (self._turn, self._watch):
            if handle is not None:
                handle.cancel()
        self._wake()

    @property
    def _num_taken(self) -> int:
        return self._num_given - self._transport.get_write_buffer_size()

    @property
    def _may_write(self) -> bool:
        return bool(self._waiting) and not self._is_paused and not self._transport.is_closing()

    def _write(self) -> None:
        num_left = TURN_BYTES
        while self._may_write and num_left > 0:
            piece = self._next_piece()
            num_left -= len(piece)
            self._give(piece)
        if self._may_write and self._turn is None:
            self._turn = self._loop.call_soon(self._next_turn)
        if not self._waiting and self.is_closing:
            self._transport.close()
        if self.is_drained:
            self._wake()

    def _next_turn(self) -> None:
        self._turn = None
        self._write()

    def _next_piece(self) -> bytes | memoryview:
        """The first bytes that wait: of a large buffer a part, of small ones several."""
        first = self._waiting.popleft()
        if first.nbytes > PIECE_BYTES:
            self._waiting.appendleft(first[PIECE_BYTES:])
            first = first[:PIECE_BYTES]
        taken, num_bytes = [first], first.nbytes
        while self._waiting and num_bytes + self._waiting[0].nbytes <= PIECE_BYTES:
            taken.append(self._waiting.popleft())
            num_bytes += taken[-1].nbytes
        self._num_waiting -= num_bytes
        return first if len(taken) == 1 else b"".join(taken)

    def _give(self, piece: bytes | memoryview) -> None:
        self._num_given += len(piece)
        self._transport.write(piece)

    def _watch_from(self, num_taken: int) -> None:
        self._watch = self._loop.call_later(self._stall_timeout_s, self._look, num_taken)

    def _look(self, num_taken_before: int) -> None:
        self._watch = None
        if self.num_pending == 0:
            return
        if self._num_taken > num_taken_before:
            self._watch_from(self._num_taken)
        else:
            self._stalled()

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()
