"""A streaming HTTP/1.1 client that costs microseconds per chunk.

Owns one keep-alive connection, and when each piece of a response's body arrived. It never looks
into a body: on a machine that the client shares with the server, that must wait until the clock has
stopped.
"""

import asyncio
import time
from dataclasses import dataclass
from typing import cast
from urllib.parse import SplitResult

import httptools


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Bytes of a body, with their arrival on `time.perf_counter`'s clock."""

    arrival_s: float
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """One whole response; `start_s` is when its request was written."""

    status: int
    start_s: float
    pieces: tuple[Piece, ...]


class StreamConnection(asyncio.Protocol):
    """Sends one request at a time; owns its socket and the response that is under way."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[Response] | None = None
        self._start_s = 0.0
        self._arrival_s = 0.0
        self._pieces: list[Piece] = []

    @classmethod
    async def open(cls, url: SplitResult) -> "StreamConnection":
        """Connects to `url`'s host and port (80 where it names none)."""
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            lambda: cls(url.netloc), url.hostname or "", url.port or 80
        )
        return connection

    async def post(self, path: str, body: bytes) -> Response:
        """Sends a JSON body and returns when the response has ended.

        Raises:
            ConnectionError: the server closed the connection before that.
        """
        if self._transport is None or self._transport.is_closing():
            raise ConnectionError("the connection is closed")
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {self._host}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self._pieces = []
        self._done = asyncio.get_running_loop().create_future()
        self._start_s = time.perf_counter()
        self._transport.write(head.encode() + body)
        return await self._done

    def close(self) -> None:
        """Closes the socket; safe to call twice."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps the socket that asyncio opened."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Stamps what arrived and feeds it to the parser."""
        self._arrival_s = time.perf_counter()
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fails the request under way, if there is one."""
        if self._done is not None and not self._done.done():
            self._done.set_exception(exc or ConnectionError("the server closed the connection"))

    def on_body(self, body: bytes) -> None:
        """Called by the parser with each piece of the body."""
        self._pieces.append(Piece(arrival_s=self._arrival_s, body=body))

    def on_message_complete(self) -> None:
        """Called by the parser at the response's end."""
        if self._done is not None and not self._done.done():
            self._done.set_result(
                Response(
                    status=self._parser.get_status_code(),
                    start_s=self._start_s,
                    pieces=tuple(self._pieces),
                )
            )
