"""What Serve sees of a client's headers, and what the app sees."""

from typing import Any

import pytest
from ray.serve._private.http_util import (
    _apply_middlewares,
    parse_disconnect_disabled_header,
    parse_request_timeout_header,
    parse_session_id_header,
)
from starlette.types import Message, Receive, Scope, Send

from router.client_headers import ClientHeadersMiddleware, Headers, middlewares

CLIENTS: Headers = [
    (b"x-request-id", b"caf\xe9"),
    (b"x-session-id", b"\xff"),
    (b"x-request-timeout-seconds", b"0.5"),
    (b"x-request-disconnect-disabled", b"?0"),
    (b"serve_multiplexed_model_id", b"\xfe"),
    (b"authorization", b"Bearer key"),
]


class Serve:
    """As Serve's replica: reads headers, and hands the same scope on."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self.seen: Headers = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.seen = list(scope["headers"])
        await self._app(scope, receive, send)


async def ask(headers: Headers, answer: Headers) -> tuple[Headers, Headers, Headers]:
    """The headers that Serve sees, that the app sees, and that the client gets."""
    seen: Headers = []
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend(scope["headers"])
        await send({"type": "http.response.start", "status": 200, "headers": answer})
        await send({"type": "http.response.body", "body": b""})

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    serve = Serve(ClientHeadersMiddleware(app))
    outer = _apply_middlewares(serve, middlewares())
    await outer({"type": "http", "headers": list(headers)}, receive, send)
    return serve.seen, seen, sent[0]["headers"]


async def test_serve_takes_no_orders_and_the_app_sees_all() -> None:
    by_serve, by_app, _ = await ask(CLIENTS, [])
    headers = dict(by_serve)
    assert parse_request_timeout_header(headers, None) is None
    assert parse_session_id_header(headers) == ""
    assert parse_disconnect_disabled_header(headers)
    assert not {name for name, _ in by_serve} & {b"authorization", b"serve_multiplexed_model_id"}
    assert by_app == CLIENTS


async def test_without_an_id_of_the_clients_the_app_sees_none_of_serves() -> None:
    by_serve, by_app, _ = await ask([], [])
    assert b"x-request-id" in dict(by_serve)
    assert by_app == []


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        pytest.param([(b"x-request-id", b"mine")], [], id="of-the-client"),
        pytest.param([(b"x-request-id", b"mine")], [(b"X-Request-Id", b"mine")], id="said-by-both"),
        pytest.param([], [(b"X-Request-Id", b"mine")], id="of-vllm"),
    ],
)
async def test_one_id_comes_back(asked: Headers, answered: Headers) -> None:
    _, _, got = await ask(asked, [(b"a", b"b"), *answered])
    assert got == [(b"a", b"b"), (b"x-request-id", b"mine")]


async def test_an_id_without_end_does_not_come_back() -> None:
    _, _, got = await ask([(b"x-request-id", b"x" * 1000)], [])
    (told,) = [value for name, value in got if name == b"x-request-id"]
    assert len(told) < 100


async def test_without_serve_around_it_headers_are_left_as_they_are() -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    scope = {"type": "http", "headers": [(b"a", b"b")]}
    await ClientHeadersMiddleware(app)(scope, None, None)  # type: ignore[arg-type]
    assert seen == [{"type": "http", "headers": [(b"a", b"b")]}]
