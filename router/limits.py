"""ASGI middlewares that refuse what is too large or too slow before vLLM's app sees it."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.body_check import check_body
from router.client_headers import MAX_ID_BYTES, REQUEST_ID
from router.refusals import Refusal
from router.route_header import refuse
from router.settings import RequestLimits

MAX_HEADERS = 512
MAX_HEADER_BYTES = 96 * 1024
"""Of all names and values; HAProxy takes somewhat more: see cluster.haproxy."""
RETRY_AFTER_S = 1
SMALL_BODY_BYTES = 64 * 1024
"""So much of each is always taken: large ones of a few clients keep no chat out."""
MAX_DRAINED = 16
"""How many times the limit of a body is read and dropped before the connection is closed."""

_WITHOUT_BODY = ("GET", "HEAD", "OPTIONS")


class HeaderLimitMiddleware:
    """Refuses headers that are too many or too large."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = check_headers(scope["headers"]) if scope["type"] == "http" else None
        if refusal is not None:
            await refuse(send, refusal)
        else:
            await self._app(scope, receive, send)


def check_headers(headers: Iterable[tuple[bytes, bytes]]) -> Refusal | None:
    """What is too much in a request's headers, if anything."""
    num_headers = num_bytes = 0
    for name, value in headers:
        num_headers += 1
        num_bytes += len(name) + len(value)
        if name == REQUEST_ID and len(value) > MAX_ID_BYTES:
            told = f"X-Request-Id is longer than {MAX_ID_BYTES} bytes."
            return Refusal(status=HTTPStatus.BAD_REQUEST, message=told, param="X-Request-Id")
    if num_headers <= MAX_HEADERS and num_bytes <= MAX_HEADER_BYTES:
        return None
    return Refusal(
        status=HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
        message=f"The request has {num_headers} headers of {num_bytes} bytes; at most "
        f"{MAX_HEADERS} of {MAX_HEADER_BYTES} bytes may be.",
        closes=True,
    )


class BodyLimitMiddleware:
    """Reads the body, looks at it, and hands it on whole; refuses it where it is too much.

    Owns the count of what is held of all bodies, from their first byte to the end of their answers.
    """

    def __init__(self, app: ASGIApp, limits: RequestLimits) -> None:
        self._app = app
        self._limits = limits
        self._num_held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in _WITHOUT_BODY:
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        num_declared = int(declared) if declared.isdigit() else 0
        received = _Received()
        try:
            refusal = await self._receive(receive, num_declared, received)
            body = bytes(received.body)
            received.body.clear()
            if (refusal := refusal or self._excess(body)) is not None:
                await refuse(send, refusal)
            else:
                await self._app(scope, _once(body, receive), send)
        except _Gone:
            pass
        finally:
            self._num_held -= received.num_held

    async def _receive(
        self, receive: Receive, num_declared: int, received: "_Received"
    ) -> Refusal | None:
        try:
            async with asyncio.timeout(self._limits.receive_timeout_s):
                return await self._read(receive, num_declared, received)
        except TimeoutError:
            return received.refusal or self._too_slow()

    async def _read(
        self, receive: Receive, num_declared: int, received: "_Received"
    ) -> Refusal | None:
        """Reads to the end of the body, which it keeps where it is not refused."""
        num_bytes, more = 0, True
        # Most clients read an answer only once they have sent their body: let them.
        while more and num_bytes <= MAX_DRAINED * self._limits.max_body_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            chunk = message.get("body", b"")
            num_bytes += len(chunk)
            more = message.get("more_body", False)
            received.refusal = received.refusal or self._is_too_much(
                max(num_bytes, num_declared), chunk
            )
            if received.refusal is None:
                received.body += chunk
                self._hold(received, num_bytes)
            else:
                received.body.clear()
                self._hold(received, 0)
        return received.refusal

    def _is_too_much(self, num_bytes: int, chunk: bytes) -> Refusal | None:
        """Why a body of so many bytes is refused when this part of it comes."""
        if num_bytes > self._limits.max_body_bytes:
            return self._too_large()
        is_small = num_bytes <= SMALL_BODY_BYTES
        if not is_small and self._num_held + len(chunk) > self._limits.max_bodies_bytes:
            return self._too_many()
        return None

    def _hold(self, received: "_Received", num_bytes: int) -> None:
        self._num_held += num_bytes - received.num_held
        received.num_held = num_bytes

    def _too_large(self) -> Refusal:
        return Refusal(
            status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            message=f"The request body is larger than {self._limits.max_body_bytes} bytes.",
            closes=True,
        )

    def _too_many(self) -> Refusal:
        return Refusal(
            status=HTTPStatus.SERVICE_UNAVAILABLE,
            message=f"The requests of all clients hold {self._limits.max_bodies_bytes} bytes "
            "already, try again.",
            retry_after_s=RETRY_AFTER_S,
            closes=True,
        )

    def _too_slow(self) -> Refusal:
        return Refusal(
            status=HTTPStatus.REQUEST_TIMEOUT,
            message=f"The request body was not here in {self._limits.receive_timeout_s:g} s.",
            closes=True,
        )

    def _excess(self, body: bytes) -> Refusal | None:
        excess = check_body(body, max_choices=self._limits.max_choices)
        if excess is None:
            return None
        return Refusal(status=HTTPStatus.BAD_REQUEST, message=excess.message, param=excess.param)


@dataclass(slots=True)
class _Received:
    """Of one body."""

    body: bytearray = field(default_factory=bytearray)
    num_held: int = 0
    """What it has in the count of all, also when it has been handed on."""
    refusal: Refusal | None = None
    """Why the rest is read and dropped."""


class _Gone(Exception):
    """The client has gone before it had sent its body."""


def _once(body: bytes, receive: Receive) -> Receive:
    """The body in one message, and then what else comes."""
    is_given = False

    async def give() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return give
