"""A client that sends bytes and says what came back.

Owns a shot from its first connection to its reply. Whatever the server does is a reply; what to
make of it is `verdict`'s.
"""

import asyncio
import re
import time
from dataclasses import dataclass
from enum import Enum

import httptools

from benchmarks.fuzz.shots import Shot, Then
from benchmarks.fuzz.watch import Listener

_KEPT_BYTES = 2_000
_READ_BYTES = 65_536
_NOBODY_ANSWERS_S = 1.0
"""How long other ports are read from: they owe a stranger nothing."""
_ERROR_EVENT = re.compile(rb'data: \{"error".*?"code": ?(\d+)')


class End(Enum):
    """How it went. The value is the name in the report."""

    ANSWERED = "answered"
    CLOSED = "closed without an answer"
    CUT = "closed within an answer"
    REFUSED = "no connection"
    SILENT = "no answer in time"
    LEFT = "left by the client"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What came for a shot; `statuses` holds one for each HTTP answer that began.

    `error_code` is that of an error which came as an event of a stream.
    """

    end: End
    start_s: float
    end_s: float
    statuses: tuple[int, ...] = ()
    error_code: int | None = None
    beginning: str = ""


class Gun:
    """Sends shots to a front door and its neighbours, and keeps the connections that linger."""

    def __init__(self, front: Listener, others: tuple[Listener, ...], *, patience_s: float) -> None:
        self._front = front
        self._others = others
        self._patience_s = patience_s
        self._lingering: list[asyncio.StreamWriter] = []

    async def fire(self, shot: Shot) -> Reply:
        """Sends it over all of its connections; the reply is the worst of theirs."""
        replies = await asyncio.gather(
            *(self._fire_once(shot) for _ in range(shot.num_connections))
        )
        return max(replies, key=lambda reply: (list(End).index(reply.end), reply.end_s))

    def release(self) -> None:
        """Ends the connections that linger."""
        for writer in self._lingering:
            writer.transport.abort()
        self._lingering.clear()

    def target(self, shot: Shot) -> Listener:
        """Where a shot goes."""
        if shot.port is None or not self._others:
            return self._front
        return self._others[int(shot.port * len(self._others))]

    async def _fire_once(self, shot: Shot) -> Reply:
        start_s = time.monotonic()
        reading = _Reading(shot)
        patience_s = self._patience_s if shot.port is None else _NOBODY_ANSWERS_S
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(patience_s):
                target = self.target(shot)
                reader, writer = await asyncio.open_connection(target.host, target.port)
                reading.is_connected = True
                end = await _converse(shot, reading, reader, writer)
        except TimeoutError:
            end = End.LEFT if reading.has_body else End.SILENT
        except OSError:
            end = reading.how_it_was_closed()
        if writer is not None:
            if shot.then is Then.LINGER and end is End.LEFT:
                self._lingering.append(writer)
            else:
                writer.transport.abort()
        return reading.reply(end, start_s=start_s)


async def _converse(
    shot: Shot, reading: "_Reading", reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> End:
    await _send(shot, writer)
    if shot.then in (Then.LEAVE, Then.LINGER):
        return End.LEFT
    while data := await reader.read(_READ_BYTES):
        reading.take(data)
        if reading.is_done:
            return End.ANSWERED
        if shot.then is Then.LEAVE_READING and reading.has_body:
            return End.LEFT
    return reading.how_it_was_closed()


async def _send(shot: Shot, writer: asyncio.StreamWriter) -> None:
    for part in shot.parts:
        if part.pause_s:
            await asyncio.sleep(part.pause_s)
        writer.write(part.data)
        try:
            await writer.drain()
        except ConnectionError:
            return  # What it said before it hung up may still be read.
    if shot.then is Then.HALF_CLOSE:
        writer.write_eof()


class _Reading:
    """Owns what has come over one connection so far."""

    def __init__(self, shot: Shot) -> None:
        self._shot = shot
        self._parser = httptools.HttpResponseParser(self)
        self._beginning = b""
        self._statuses: list[int] = []
        self._num_whole = 0
        self._error_code: int | None = None
        self._is_http = True
        self._has_length = False
        """Whether the answer that comes says where it ends; else it does so by hanging up."""
        self.is_connected = False
        self.has_body = False

    @property
    def is_done(self) -> bool:
        """Whether all answers have come whole."""
        return self._num_whole >= self._shot.num_answers

    def take(self, data: bytes) -> None:
        """Reads on; bytes that are no HTTP are only kept."""
        self._beginning += data[: _KEPT_BYTES - len(self._beginning)]
        if found := _ERROR_EVENT.search(data):
            self._error_code = int(found.group(1))
        if not self._is_http:
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._is_http = False

    def how_it_was_closed(self) -> End:
        """What the connection's end means here."""
        if not self.is_connected:
            return End.REFUSED
        if not self._beginning:
            return End.CLOSED
        if self._num_whole < len(self._statuses) and self._has_length:
            return End.CUT
        return End.ANSWERED

    def reply(self, end: End, *, start_s: float) -> Reply:
        """All of it, now."""
        return Reply(
            end=end,
            start_s=start_s,
            end_s=time.monotonic(),
            statuses=tuple(self._statuses),
            error_code=self._error_code,
            beginning=self._beginning.decode("latin-1"),
        )

    def on_message_begin(self) -> None:
        """Called by the parser before an answer."""
        self._has_length = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser with each header."""
        self._has_length |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        """Called by the parser when an answer has begun."""
        status = self._parser.get_status_code()
        if status >= 200:
            self._statuses.append(status)
            self._num_whole += self._shot.has_no_body

    def on_body(self, body: bytes) -> None:
        """Called by the parser with each piece of a body."""
        self.has_body = True

    def on_message_complete(self) -> None:
        """Called by the parser at an answer's end; one of 1xx is not the answer."""
        if self._parser.get_status_code() >= 200 and not self._shot.has_no_body:
            self._num_whole += 1
