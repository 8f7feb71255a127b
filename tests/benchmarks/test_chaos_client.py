"""The chaos run's client against a server of a few lines."""

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest

from benchmarks.chaos_cases import Case
from benchmarks.chaos_client import Client, Outcome
from cluster.haproxy import ERRORS

STREAMED = Case(name="streamed", path="completions", fields={"prompt": "a", "stream": True})
WHOLE = Case(name="whole", path="chat/completions", fields={"messages": []})

Answering = Callable[[asyncio.StreamWriter], Awaitable[None]]


async def ask(
    case: Case,
    answering: Answering,
    *,
    timeout_s: float = 30.0,
    leave_after: int | None = None,
    pause_s: float = 0.0,
) -> tuple[Outcome, str]:
    """Asks a server that answers so; returns the outcome and the request's first line."""
    requests: list[str] = []
    closed = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append((await reader.readline()).decode())
        await reader.readuntil(b"}")
        try:
            await answering(writer)
            await writer.drain()
        except ConnectionError:
            requests.append("gone")
        finally:
            writer.close()
            closed.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        client = Client(f"http://127.0.0.1:{port}/v1", timeout_s=timeout_s)
        outcome = await client.ask(case, leave_after=leave_after, pause_s=pause_s)
        await closed.wait()
    return outcome, requests[0]


def event(text: str, *token_ids: int) -> bytes:
    choice = {"index": 0, "text": text, "token_ids": token_ids}
    return f"data: {json.dumps({'choices': [choice]})}\n\n".encode()


DONE = b"data: [DONE]\n\n"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"


def sending(*parts: bytes) -> Answering:
    async def answering(writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()

    return answering


def whole(status: str, body: object) -> Answering:
    text = json.dumps(body).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(text)}\r\n\r\n"
    return sending(head.encode(), text)


async def test_stream() -> None:
    answering = sending(
        STREAM_HEAD,
        event("a", 1),
        event(
            "",
        ),
        event("bc", 2, 3),
        DONE,
    )

    outcome, request = await ask(STREAMED, answering)

    assert request == "POST /v1/completions HTTP/1.1\r\n"
    assert outcome.error is None
    assert outcome.answer is not None
    assert outcome.answer.choices[0].token_ids == (1, 2, 3)
    (arrivals_s,) = outcome.arrivals_s
    first_s, second_s = arrivals_s
    assert outcome.start_s <= first_s <= second_s <= outcome.end_s


async def test_whole() -> None:
    choice = {"index": 0, "message": {"content": "hello"}, "token_ids": [1]}

    outcome, request = await ask(WHOLE, whole("200 OK", {"choices": [choice]}))

    assert request == "POST /v1/chat/completions HTTP/1.1\r\n"
    assert outcome.answer is not None
    assert outcome.answer.choices[0].text == "hello"


@pytest.mark.parametrize("case", [STREAMED, WHOLE], ids=lambda case: case.name)
@pytest.mark.parametrize(
    ("answering", "error", "broken"),
    [
        pytest.param(
            whole("503 Service Unavailable", {"error": {"message": "no replica"}}),
            "HTTP 503: no replica",
            False,
            id="refused",
        ),
        pytest.param(whole("500 Internal Server Error", "oh"), 'HTTP 500: "oh"', False, id="error"),
        pytest.param(
            whole("502 Bad Gateway", {"error": {"message": ERRORS[502]}}),
            "HTTP 502 from the proxy",
            True,
            id="the proxy lost the router",
        ),
        pytest.param(
            sending(), "RemoteProtocolError: Server disconnected", True, id="closed without a word"
        ),
    ],
)
async def test_no_answer(case: Case, answering: Answering, error: str, broken: bool) -> None:
    outcome, _ = await ask(case, answering)

    assert (outcome.answer, outcome.broken) == (None, broken)
    assert outcome.error is not None
    assert outcome.error.startswith(error)


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        pytest.param((event("a", 1),), "the stream was cut off", id="cut off"),
        pytest.param(
            (event("a", 1), b'data: {"error": {"message": "lost"}}\n\n', DONE),
            "error in the stream: lost",
            id="error",
        ),
        pytest.param((b"data: {oh\n\n", DONE), "not JSON: '{oh'", id="nonsense"),
    ],
)
async def test_a_stream_that_fails(parts: tuple[bytes, ...], error: str) -> None:
    outcome, _ = await ask(STREAMED, sending(STREAM_HEAD, *parts))

    assert (outcome.answer, outcome.error) == (None, error)


async def test_a_client_that_leaves() -> None:
    outcome, _ = await ask(
        STREAMED, sending(STREAM_HEAD, event("a", 1), event("b", 2), DONE), leave_after=2
    )

    assert outcome.left
    assert (outcome.answer, outcome.error) == (None, None)
    assert len(outcome.arrivals_s[0]) == 2


async def test_a_client_that_does_not_read_for_a_while() -> None:
    outcome, _ = await ask(
        STREAMED, sending(STREAM_HEAD, event("a", 1), event("b", 2), DONE), pause_s=0.05
    )

    assert outcome.answer is not None
    assert outcome.answer.choices[0].token_ids == (1, 2)


async def test_no_end_in_time() -> None:
    async def without_end(writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD)
        while True:  # until the client has gone, which breaks the connection
            writer.write(b": still here\n\n")
            await writer.drain()
            await asyncio.sleep(0.01)

    outcome, _ = await ask(STREAMED, without_end, timeout_s=0.1)

    assert outcome.error == "no end within 0.1 s"
