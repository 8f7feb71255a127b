"""The client that sends bytes, against a server of a few lines."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import pytest

from benchmarks.fuzz.client import End, Gun, Reply
from benchmarks.fuzz.shots import Kind, Part, Shot, Then
from benchmarks.fuzz.watch import Listener

Serving = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

REQUEST = b"GET / HTTP/1.1\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def local(port: int) -> Listener:
    return Listener(port=port, address="127.0.0.1", process="a server")


def shot(
    then: Then = Then.READ,
    *,
    num_connections: int = 1,
    num_answers: int = 1,
    has_no_body: bool = False,
) -> Shot:
    return Shot(
        kind=Kind.FRAMING,
        name="a shot",
        parts=(Part(data=REQUEST),),
        then=then,
        num_connections=num_connections,
        num_answers=num_answers,
        has_no_body=has_no_body,
    )


async def fire(given: Shot, serving: Serving, *, patience_s: float = 30.0) -> Reply:
    """Fires at a server that serves so, and waits until it has served."""
    served: list[asyncio.Task[None]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        served.append(task)
        with contextlib.suppress(ConnectionError):
            await serving(reader, writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        gun = Gun(local(server.sockets[0].getsockname()[1]), (), patience_s=patience_s)
        reply = await gun.fire(given)
        gun.release()
        await asyncio.gather(*served)
    return reply


def sending(*parts: bytes) -> Serving:
    async def serving(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for part in parts:
            writer.write(part)
            await writer.drain()

    return serving


def stream(event: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(event), event)


@pytest.mark.parametrize(
    ("sent", "end", "statuses"),
    [
        pytest.param(OK, End.ANSWERED, (200,), id="whole"),
        pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n" + OK, End.ANSWERED, (200,), id="continue"),
        pytest.param(OK[:-1], End.CUT, (200,), id="cut"),
        pytest.param(b"", End.CLOSED, (), id="nothing"),
        pytest.param(b"HTTP/1.1 400 Bad\r\n\r\n", End.ANSWERED, (400,), id="until the end"),
        pytest.param(b"no HTTP at all", End.ANSWERED, (), id="no HTTP"),
    ],
)
async def test_replies(sent: bytes, end: End, statuses: tuple[int, ...]) -> None:
    reply = await fire(shot(), sending(sent))
    assert (reply.end, reply.statuses) == (end, statuses)


async def test_an_error_in_a_stream() -> None:
    event = b'data: {"error": {"message": "no", "code": 500}}\n\n'
    reply = await fire(shot(), sending(stream(event)))
    assert (reply.statuses, reply.error_code) == ((200,), 500)


async def test_all_answers_of_a_pipeline() -> None:
    whole = await fire(shot(num_answers=2), sending(OK, OK))
    short = await fire(shot(num_answers=2), sending(OK))
    assert (whole.end, whole.statuses) == (End.ANSWERED, (200, 200))
    assert short.statuses == (200,)


async def test_an_answer_to_head_has_no_body() -> None:
    reply = await fire(shot(has_no_body=True), sending(OK[:-2]))
    assert (reply.end, reply.statuses) == (End.ANSWERED, (200,))


async def test_a_server_that_says_nothing() -> None:
    async def until_it_leaves(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    reply = await fire(shot(), until_it_leaves, patience_s=0.2)
    assert reply.end is End.SILENT


async def test_a_server_that_goes_on_and_on() -> None:
    async def until_it_leaves(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\nsome")
        await reader.read()

    reply = await fire(shot(), until_it_leaves, patience_s=0.5)
    assert (reply.end, reply.statuses) == (End.LEFT, (200,))


async def test_nobody_there() -> None:
    server = await asyncio.start_server(sending(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    assert (await Gun(local(port), (), patience_s=30).fire(shot())).end is End.REFUSED


async def test_the_other_side_sees_a_half_closed_one_end() -> None:
    seen: list[bytes] = []

    async def serving(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.read())
        writer.write(OK)
        await writer.drain()

    reply = await fire(shot(Then.HALF_CLOSE), serving)
    assert (reply.end, seen) == (End.ANSWERED, [REQUEST])


async def test_one_that_lingers_stays_until_the_release() -> None:
    left = asyncio.Semaphore(0)

    async def serving(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            await reader.read()
        left.release()
        writer.close()

    server = await asyncio.start_server(serving, "127.0.0.1", 0)
    async with server:
        gun = Gun(local(server.sockets[0].getsockname()[1]), (), patience_s=30)
        reply = await gun.fire(shot(Then.LINGER, num_connections=3))
        assert (reply.end, left.locked()) == (End.LEFT, True)
        gun.release()
        for _ in range(3):
            await left.acquire()


async def test_a_client_leaves_when_an_answer_has_begun() -> None:
    async def serving(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\nsome")
        await reader.read()

    reply = await fire(shot(Then.LEAVE_READING), serving)
    assert (reply.end, reply.statuses) == (End.LEFT, (200,))


def test_a_place_among_the_ports() -> None:
    gun = Gun(local(80), tuple(map(local, (1, 2, 3))), patience_s=1)
    places = [
        Shot(kind=Kind.PORT, name="p", parts=(), port=place) for place in (0.0, 0.4, 0.99, None)
    ]
    assert [gun.target(each).port for each in places] == [1, 2, 3, 80]
