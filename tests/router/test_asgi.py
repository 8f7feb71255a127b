"""The ASGI middlewares: body limit, waiting for replicas, ending by oneself."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from ray.serve._private.http_util import parse_disconnect_disabled_header
from starlette.types import Message, Receive, Scope, Send

from router import disconnect
from router.admission import WaitsForReplicas, unavailable
from router.answers import NOTE, TellsRoute, note_route
from router.disconnect import EndsByItself, WatchesItself
from router.limits import BodyLimit

Sent = list[Message]


def receive_from(*messages: Message) -> Receive:
    queue = list(messages)

    async def receive() -> Message:
        return queue.pop(0) if queue else {"type": "http.disconnect"}

    return receive


def send_to(sent: Sent) -> Send:
    async def send(message: Message) -> None:
        sent.append(message)

    return send


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads the whole body and answers its length."""
    num_bytes, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        num_bytes += len(message["body"])
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(num_bytes).encode()})


def scope(headers: dict[str, str] | None = None) -> dict[str, Any]:
    pairs = [(key.encode(), value.encode()) for key, value in (headers or {}).items()]
    return {"type": "http", "headers": pairs}


def chunk(num_bytes: int, *, more: bool = False) -> Message:
    return {"type": "http.request", "body": b"x" * num_bytes, "more_body": more}


@pytest.mark.parametrize(
    ("headers", "messages", "status"),
    [
        pytest.param({"content-length": "10"}, [chunk(10)], 200, id="at-the-limit"),
        pytest.param({"content-length": "11"}, [chunk(11)], 413, id="declared-over"),
        pytest.param({}, [chunk(5, more=True), chunk(5)], 200, id="chunked-at-the-limit"),
        pytest.param({}, [chunk(6, more=True), chunk(6)], 413, id="chunked-over"),
        pytest.param({"content-length": "1"}, [chunk(11)], 413, id="declared-wrongly"),
    ],
)
async def test_body_limit(headers: dict[str, str], messages: list[Message], status: int) -> None:
    sent: Sent = []
    await BodyLimit(echo, 10)(scope(headers), receive_from(*messages), send_to(sent))
    assert sent[0]["status"] == status
    assert len(sent) == 2
    if status == 413:
        assert json.loads(sent[1]["body"])["error"]["code"] == 413


async def test_an_app_that_hears_of_the_disconnect_ends_by_itself() -> None:
    gone, cleaned_up = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        cleaned_up.set()

    async def receive() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    task = asyncio.create_task(EndsByItself(app)(scope(), receive, send_to([])))
    await asyncio.sleep(0)
    gone.set()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned_up.is_set()


async def test_an_app_that_does_not_end_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disconnect, "GRACE_S", 0.01)
    was_cancelled = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            was_cancelled.set()
            raise

    task = asyncio.create_task(EndsByItself(app)(scope(), receive_from(), send_to([])))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(was_cancelled.wait(), 5)


async def test_serve_is_told_not_to_watch_and_then_nothing_is_shielded() -> None:
    watched: list[bool] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        watched.append(not parse_disconnect_disabled_header(dict(scope["headers"])))
        await asyncio.Event().wait()

    whole = WatchesItself(EndsByItself(app))
    task = asyncio.create_task(whole(scope(), receive_from(), send_to([])))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task], timeout=0)
    assert watched == [False]
    assert task.cancelled(), "a cancel reaches the app at once"


@pytest.mark.parametrize(
    "make", [EndsByItself, WatchesItself, TellsRoute, lambda app: BodyLimit(app, 1)]
)
async def test_errors_and_other_scopes_pass_through(make: Callable[..., Any]) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise LookupError(scope["type"])

    with pytest.raises(LookupError, match="lifespan"):
        await make(app)({"type": "lifespan"}, receive_from(), send_to([]))


def post(path: str) -> dict[str, Any]:
    return {**scope(), "method": "POST", "path": path}


async def test_without_a_decode_replica_a_request_is_told_to_come_back() -> None:
    """With a status, which a stream that has begun could not carry any more."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("the app was asked")

    sent: list[Message] = []
    held = WaitsForReplicas(app, asyncio.Event().wait, max_wait_s=0.01)
    await held(post("/v1/completions"), receive_from(), send_to(sent))
    assert sent[0]["status"] == 503
    assert (b"retry-after", b"10") in sent[0]["headers"]
    assert b"decode" in sent[1]["body"]


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
async def test_what_needs_no_engine_does_not_wait(path: str) -> None:
    asked: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        asked.append(scope["path"])

    held = WaitsForReplicas(app, asyncio.Event().wait, max_wait_s=60)
    await held(post(path), receive_from(), send_to([]))
    assert asked == [path]


def streams(*, says: Callable[[], None]) -> Callable[..., Any]:
    """An app that sends its status at once, and learns of the way before its body's first part."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        says()
        for part in (b"one", b"two"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return app


async def test_the_way_of_a_request_is_in_a_header_even_of_a_stream() -> None:
    def says() -> None:
        for route in ("prefill_first;reason=default", "decode_only;reason=short_prompt") * 2:
            note_route(NOTE.get(), route)

    sent: Sent = []
    await TellsRoute(streams(says=says))(scope(), receive_from(), send_to(sent))
    told = b"prefill_first;reason=default, decode_only;reason=short_prompt"
    assert sent[0]["headers"] == [(b"a", b"b"), (b"x-pdserve-route", told)]
    assert [message["body"] for message in sent[1:]] == [b"one", b"two", b""]


async def test_a_stream_that_is_refused_has_a_status() -> None:
    def says() -> None:
        note = NOTE.get()
        assert note is not None
        note.refusal = unavailable("not now")

    sent: Sent = []
    await TellsRoute(streams(says=says))(scope(), receive_from(), send_to(sent))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 503
    assert (b"retry-after", b"10") in sent[0]["headers"]
    assert json.loads(sent[1]["body"])["error"]["message"] == "not now"


async def test_an_answer_that_went_no_way_is_left_as_it_is() -> None:
    sent: Sent = []
    await TellsRoute(streams(says=lambda: None))(scope(), receive_from(), send_to(sent))
    assert sent[0]["headers"] == [(b"a", b"b")]
