"""The ASGI middlewares: limits, ending by oneself, and what becomes of an answer's status."""

import asyncio
import json
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError
from starlette.types import Message, Receive, Scope, Send
from vllm.exceptions import GracefulHTTPError, VLLMValidationError

from router import cancellation, limits
from router.api_keys import ApiKeyMiddleware
from router.cancellation import CancellationShield
from router.client_headers import ClientHeadersMiddleware, HeaderHidingMiddleware
from router.limits import BodyLimitMiddleware, HeaderLimitMiddleware
from router.refusals import unavailable
from router.route_header import RouteHeaderMiddleware
from router.route_note import NOTE, note_failure, note_route
from router.settings import RequestLimits

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


async def nothing() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    sent: Sent = []
    await BodyLimitMiddleware(echo, RequestLimits(receive_timeout_s=0.01))(
        scope(), nothing, send_to(sent)
    )
    assert sent[0]["status"] == 408
    assert (b"connection", b"close") in sent[0]["headers"]


async def test_a_client_that_leaves_within_its_body_is_not_answered() -> None:
    sent: Sent = []
    await BodyLimitMiddleware(echo, RequestLimits())(
        scope(), receive_from(chunk(1, more=True)), send_to(sent)
    )
    assert sent == []


async def test_a_body_that_holds_too_much_is_refused() -> None:
    sent: Sent = []
    body = {"type": "http.request", "body": b'{"n": 3}'}
    limit = BodyLimitMiddleware(echo, RequestLimits(max_choices=2))
    await limit(scope(), receive_from(body), send_to(sent))
    assert sent[0]["status"] == 400
    error = json.loads(sent[1]["body"])["error"]
    assert (error["type"], error["param"], error["code"]) == ("BadRequestError", "n", 400)


async def test_what_comes_after_the_body_reaches_the_app() -> None:
    seen: list[str] = []
    receive = receive_from(chunk(1, more=True), chunk(1))
    await BodyLimitMiddleware(app_that_waits(seen), RequestLimits())(scope(), receive, send_to([]))
    assert seen == ["working", "gone"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        pytest.param({"x": "y" * 65536}, 200, id="64-kib"),
        pytest.param({f"x-{i}": "y" for i in range(256)}, 200, id="256"),
        pytest.param({"x": "y" * 100_000}, 431, id="too-large"),
        pytest.param({f"x-{i}": "y" for i in range(513)}, 431, id="too-many"),
        pytest.param({"x-request-id": "i" * 256}, 200, id="id"),
        pytest.param({"x-request-id": "i" * 257}, 400, id="long-id"),
    ],
)
async def test_header_limit(headers: dict[str, str], status: int) -> None:
    sent: Sent = []
    await HeaderLimitMiddleware(echo)(scope(headers), receive_from(chunk(1)), send_to(sent))
    assert sent[0]["status"] == status
    if status != 200:
        assert json.loads(sent[1]["body"])["error"]["code"] == status


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
    return {"type": "http", "method": "POST", "path": "/v1/completions", "headers": pairs}


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
    limit = BodyLimitMiddleware(echo, RequestLimits(max_body_bytes=10))
    await limit(scope(headers), receive_from(*messages), send_to(sent))
    assert sent[0]["status"] == status
    assert len(sent) == 2
    if status == 413:
        assert json.loads(sent[1]["body"])["error"]["code"] == 413


@pytest.mark.parametrize("small_bytes", [0, 64 * 1024])
async def test_all_bodies_together_are_bounded_until_their_answers_end(
    small_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SMALL_BODY_BYTES", small_bytes)
    may_end, sent, running = asyncio.Event(), list[Sent](), list[asyncio.Task[None]]()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await may_end.wait()
        await echo(scope, receive, send)

    limit = BodyLimitMiddleware(app, RequestLimits(max_body_bytes=10, max_bodies_bytes=25))

    async def post(*messages: Message) -> None:
        sent.append([])
        await limit(scope(), receive_from(*messages), send_to(sent[-1]))

    for messages in ((chunk(10),), (chunk(5, more=True), chunk(6)), (chunk(4, more=True),)):
        # The second is too large and the third has gone: neither is held.
        running.append(asyncio.create_task(post(*messages)))
        await asyncio.sleep(0)
    running += [asyncio.create_task(post(chunk(10))) for _ in range(2)]
    await asyncio.sleep(0)
    if not small_bytes:
        assert sent[-1][0]["status"] == 503
        assert (b"retry-after", b"1") in sent[-1][0]["headers"]
        assert json.loads(sent[-1][1]["body"])["error"]["type"] == "ServiceUnavailableError"
    may_end.set()
    await asyncio.gather(*running)
    await post(chunk(5, more=True), chunk(5))
    last = 200 if small_bytes else 503  # a small one is taken, however much others hold
    assert [each[0]["status"] for each in sent if each] == [200, 413, 200, last, 200]
    assert limit._num_held == 0


async def test_what_is_refused_stays_so_where_the_rest_never_comes() -> None:
    async def never_more() -> Message:
        if not sent_parts:
            await asyncio.Event().wait()
        return sent_parts.pop()

    sent_parts, answer = [chunk(11, more=True)], list[Message]()
    limit = BodyLimitMiddleware(echo, RequestLimits(max_body_bytes=10, receive_timeout_s=0.05))
    await limit(scope(), never_more, send_to(answer))
    assert answer[0]["status"] == 413


def app_that_waits(seen: list[str]) -> Callable[..., Any]:
    """As vLLM's handlers: waits in a task of its own for its client to go."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        seen.append("working")
        while (await asyncio.ensure_future(receive()))["type"] != "http.disconnect":
            pass
        seen.append("gone")
        await send({"type": "http.response.start", "status": 200, "headers": []})

    return app


async def test_an_app_that_hears_of_the_end_ends_by_itself() -> None:
    async def receive() -> Message:
        if not seen:
            return chunk(1)
        is_working.set()
        await has_ended.wait()
        return {"type": "http.disconnect"}

    is_working, has_ended = asyncio.Event(), asyncio.Event()
    seen: list[str] = []
    sent: Sent = []
    task = asyncio.create_task(
        CancellationShield(app_that_waits(seen))(scope(), receive, send_to(sent))
    )
    await is_working.wait()
    task.cancel()
    has_ended.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == ["working", "gone"]
    assert sent == [], "nobody is there to be answered"


async def test_an_app_that_does_not_end_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancellation, "GRACE_S", 0.01)
    was_cancelled = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            was_cancelled.set()
            raise

    task = asyncio.create_task(CancellationShield(app)(scope(), receive_from(), send_to([])))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(was_cancelled.wait(), 5)


@pytest.mark.parametrize(
    "make",
    [
        CancellationShield,
        HeaderHidingMiddleware,
        ClientHeadersMiddleware,
        HeaderLimitMiddleware,
        RouteHeaderMiddleware,
        lambda app: ApiKeyMiddleware(app, ["key"]),
        lambda app: BodyLimitMiddleware(app, RequestLimits()),
    ],
    ids=str,
)
async def test_errors_and_other_scopes_pass_through(make: Callable[..., Any]) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise LookupError(scope["type"])

    with pytest.raises(LookupError, match="lifespan"):
        await make(app)({"type": "lifespan"}, receive_from(), send_to([]))


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
    await RouteHeaderMiddleware(streams(says=says))(scope(), receive_from(), send_to(sent))
    told = b"prefill_first;reason=default, decode_only;reason=short_prompt"
    assert sent[0]["headers"] == [(b"a", b"b"), (b"x-pdserve-route", told)]
    assert [message["body"] for message in sent[1:]] == [b"one", b"two", b""]


async def test_a_stream_that_is_refused_has_a_status() -> None:
    def says() -> None:
        note = NOTE.get()
        assert note is not None
        note.refusal = unavailable("not now")

    sent: Sent = []
    await RouteHeaderMiddleware(streams(says=says))(scope(), receive_from(), send_to(sent))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 503
    assert (b"retry-after", b"10") in sent[0]["headers"]
    assert json.loads(sent[1]["body"])["error"]["message"] == "not now"


async def test_an_answer_that_went_no_way_is_left_as_it_is() -> None:
    sent: Sent = []
    await RouteHeaderMiddleware(streams(says=lambda: None))(scope(), receive_from(), send_to(sent))
    assert sent[0]["headers"] == [(b"a", b"b")]


def answers(status: int, *parts: bytes, kind: bytes = b"application/json") -> Callable[..., Any]:
    """An app that answers so, whatever it is asked."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", kind), (b"content-length", b"%d" % len(b"".join(parts)))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return app


def told(error: dict[str, Any]) -> bytes:
    return json.dumps({"error": error}).encode()


async def test_a_stream_that_begins_with_an_error_has_its_status() -> None:
    error = {"message": "logprobs", "type": "BadRequestError", "param": None, "code": 400}
    event = b"data: " + told(error) + b"\n\n"
    sent: Sent = []
    app = answers(200, event, b"data: [DONE]\n\n", kind=b"text/event-stream")
    await RouteHeaderMiddleware(app)(scope(), receive_from(), send_to(sent))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 400
    assert (b"content-type", b"application/json") in sent[0]["headers"]
    assert json.loads(sent[1]["body"]) == {"error": error}


async def test_an_error_later_in_a_stream_stays_there() -> None:
    parts = (b'data: {"id": 1}\n\n', b'data: {"error": {"code": 400}}\n\n')
    sent: Sent = []
    app = answers(200, *parts, kind=b"text/event-stream")
    await RouteHeaderMiddleware(app)(scope(), receive_from(), send_to(sent))
    assert sent[0]["status"] == 200
    assert [message["body"] for message in sent[1:]] == [*parts, b""]


@pytest.mark.parametrize("text", ["x", "\U0001f600", "é"])
async def test_an_error_does_not_tell_back_all_that_it_was_given(text: str) -> None:
    body = told({"message": text * 50_000, "param": None, "code": 400})
    sent: Sent = []
    app = answers(400, body[:10], body[10:])
    await RouteHeaderMiddleware(app)(scope(), receive_from(), send_to(sent))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert (b"content-length", b"%d" % len(sent[1]["body"])) in sent[0]["headers"]
    error = json.loads(sent[1]["body"])["error"]
    assert error["message"].startswith(text * 2000)
    assert len(sent[1]["body"]) < 10_000
    assert error["code"] == 400


OPENING = [b"event: response.created\ndata: {}\n\n", b"event: response.in_progress\ndata: {}\n\n"]


def opens(
    *, then: Callable[[], None], part: bytes, opening: Sequence[bytes] = OPENING
) -> Callable[..., Any]:
    """An app that answers as vLLM's Responses API: two events before it asks an engine."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for event in opening:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        then()
        await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return app


async def test_what_comes_before_an_engine_is_asked_is_held_too() -> None:
    sent: Sent = []
    app = opens(then=lambda: note_route(NOTE.get(), "decode_only"), part=b"data: 1\n\n")
    await RouteHeaderMiddleware(app)(scope(), receive_from(), send_to(sent))
    assert (b"x-pdserve-route", b"decode_only") in sent[0]["headers"]
    assert [message["body"] for message in sent[1:]] == [*OPENING, b"data: 1\n\n", b""]


def raises(error: Exception, cause: Exception | None = None) -> Callable[[], None]:
    def then() -> None:
        raise error from cause

    return then


STARTED = RuntimeError("the response has started")


@pytest.mark.parametrize(
    ("then", "status"),
    [
        pytest.param(raises(STARTED, VLLMValidationError("x" * 50_000)), 400, id="the-clients"),
        pytest.param(raises(VLLMValidationError("x"), KeyError()), 400, id="not-wrapped"),
        pytest.param(
            raises(STARTED, GracefulHTTPError("x", HTTPStatus.SERVICE_UNAVAILABLE)),
            503,
            id="with-a-status",
        ),
        pytest.param(raises(STARTED, ValueError("x" * 50_000)), 500, id="the-apps"),
        pytest.param(raises(TypeError("x")), 500, id="the-apps-not-wrapped"),
    ],
)
async def test_a_stream_that_fails_before_it_begins_has_a_status(
    then: Callable[[], None], status: int
) -> None:
    sent: Sent = []
    await RouteHeaderMiddleware(opens(then=then, part=b""))(scope(), receive_from(), send_to(sent))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == status
    assert json.loads(sent[1]["body"])["error"]["code"] == status
    assert len(sent[1]["body"]) < 10_000


def repeats_a_wrong_field() -> None:
    try:
        TypeAdapter(bool).validate_python({})
    except ValidationError as error:
        raise STARTED from error


@pytest.mark.parametrize(("opening", "status"), [([], 400), (OPENING, 500)])
async def test_a_field_that_vllm_cannot_repeat_is_the_clients(
    opening: list[bytes], status: int
) -> None:
    sent: Sent = []
    app = opens(then=repeats_a_wrong_field, part=b"", opening=opening)
    await RouteHeaderMiddleware(app)(scope(), receive_from(), send_to(sent))
    assert sent[0]["status"] == status


def is_refused(then: Callable[[], None] = lambda: None) -> Callable[[], None]:
    def says() -> None:
        note = NOTE.get()
        assert note is not None
        note.refusal = unavailable("not now")
        then()

    return says


def before_its_status(says: Callable[[], None]) -> Callable[..., Any]:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        says()

    return app


def after_its_status(says: Callable[[], None]) -> Callable[..., Any]:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 500, "headers": []})
        says()

    return app


FAILS = raises(STARTED, ValueError("103 validation errors"))


@pytest.mark.parametrize(
    "app",
    [
        pytest.param(
            opens(then=is_refused(), part=b'data: {"error": {"code": 400}}'), id="goes-on"
        ),
        pytest.param(opens(then=is_refused(FAILS), part=b""), id="fails-after-its-opening"),
        pytest.param(after_its_status(is_refused(FAILS)), id="fails-after-its-status"),
        pytest.param(after_its_status(is_refused()), id="returns-after-its-status"),
        pytest.param(before_its_status(is_refused(FAILS)), id="fails"),
        pytest.param(before_its_status(is_refused()), id="returns"),
    ],
)
async def test_a_refusal_goes_before_what_the_app_makes_of_it(app: Callable[..., Any]) -> None:
    sent: Sent = []
    await RouteHeaderMiddleware(app)(scope(), receive_from(), send_to(sent))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 503
    assert (b"retry-after", b"10") in sent[0]["headers"]
    assert json.loads(sent[1]["body"])["error"]["message"] == "not now"


async def test_a_refusal_after_the_first_token_changes_nothing() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await streams(says=lambda: None)(scope, receive, send)
        is_refused()()

    sent: Sent = []
    await RouteHeaderMiddleware(app)(scope(), receive_from(), send_to(sent))
    assert sent[0]["status"] == 200
    assert [message["body"] for message in sent[1:]] == [b"one", b"two", b""]


@pytest.mark.parametrize(
    ("error", "status"), [(VLLMValidationError("no", parameter="stop"), 400), (None, 200)]
)
async def test_a_stream_of_messages_that_begins_with_an_error_has_its_status(
    error: VLLMValidationError | None, status: int
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        note = NOTE.get()
        assert note is not None
        note.error = error
        event = b'event: error\ndata: {"type": "error"}\n\n'
        await answers(200, event, kind=b"text/event-stream")(scope, receive, send)

    sent: Sent = []
    await RouteHeaderMiddleware(app)(scope(), receive_from(), send_to(sent))
    assert sent[0]["status"] == status
    if error is not None:
        assert json.loads(sent[1]["body"])["error"]["param"] == "stop"


@pytest.mark.parametrize("body", [told({"message": "no", "code": 404}), b"", b"{}"], ids=str)
async def test_a_short_error_is_left_as_it_is(body: bytes) -> None:
    sent: Sent = []
    await RouteHeaderMiddleware(answers(404, body))(scope(), receive_from(), send_to(sent))
    assert (sent[0]["status"], sent[1]["body"]) == (404, body)


CHAT_OPENING = b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n'
MESSAGES_OPENING = b'event: message_start\ndata: {"type": "message_start"}\n\n'


@pytest.mark.parametrize("opening", [CHAT_OPENING, MESSAGES_OPENING], ids=["chat", "messages"])
async def test_a_stream_whose_engine_fails_before_its_first_token_has_a_status(
    opening: bytes,
) -> None:
    """vLLM sends the opening of a chat when the first output comes, whatever that is."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        note_failure(NOTE.get())
        for part in (opening, b'data: {"error": {"code": 500}}\n\n', b"data: [DONE]\n\n"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    sent: Sent = []
    await RouteHeaderMiddleware(app)(scope(), receive_from(), send_to(sent))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert sent[0]["status"] == 500
    assert json.loads(sent[1]["body"])["error"]["type"] == "InternalServerError"


async def test_a_stream_whose_engine_fails_later_goes_on_as_vllm_has_it() -> None:
    parts = (CHAT_OPENING, b'data: {"error": {"code": 500}}\n\n')

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
            note_failure(NOTE.get())
        await send({"type": "http.response.body", "body": b""})

    sent: Sent = []
    await RouteHeaderMiddleware(app)(scope(), receive_from(), send_to(sent))
    assert sent[0]["status"] == 200
    assert [message["body"] for message in sent[1:]] == [*parts, b""]
