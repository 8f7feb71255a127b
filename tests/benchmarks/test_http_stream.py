"""The streaming client against a server of a few lines."""

import asyncio
from urllib.parse import urlsplit

import pytest

from benchmarks.http_stream import Response, StreamConnection

STREAM = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"5\r\nfirst\r\n",
    b"6\r\nsecond\r\n0\r\n\r\n",
)
REFUSAL = (b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nnone",)
CUT_SHORT = STREAM[:2]


async def _post_twice(parts: tuple[bytes, ...], *, close: bool) -> list[Response]:
    """Posts two requests over one connection to a server that answers each with `parts`."""

    closed = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (await reader.readline()).startswith(b"POST /v1 "):
            await reader.readuntil(b"{}")
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.01)
            if close:
                break
        writer.close()
        await writer.wait_closed()
        closed.set()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        connection = await StreamConnection.open(urlsplit(f"http://127.0.0.1:{port}"))
        try:
            return [await connection.post("/v1", b"{}") for _ in range(2)]
        finally:
            connection.close()
            await closed.wait()


async def test_stream() -> None:
    for response in await _post_twice(STREAM, close=False):
        first, second = response.pieces
        assert response.status == 200
        assert (first.body, second.body) == (b"first", b"second")
        assert response.start_s < first.arrival_s < second.arrival_s


async def test_refusal() -> None:
    first, second = await _post_twice(REFUSAL, close=False)

    assert first.status == second.status == 404
    assert first.pieces[0].body == b"none"


async def test_connection_lost() -> None:
    with pytest.raises(ConnectionError):
        await _post_twice(CUT_SHORT, close=True)
