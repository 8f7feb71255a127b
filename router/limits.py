"""ASGI middlewares that refuse what is too large or too slow before vLLM's app sees it."""

import asyncio
from collections.abc import Iterable
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.answers import Refusal, refuse
from router.body_check import check_body
from router.client_headers import MAX_ID_BYTES, REQUEST_ID
from router.settings import RequestLimits

MAX_HEADERS = 512
MAX_HEADER_BYTES = 96 * 1024
"""Of all names and values; HAProxy takes somewhat more: see cluster.haproxy."""
MAX_DRAINED = 16
"""How many times the limit of a body is read and dropped before the connection is closed."""

_WITHOUT_BODY = ("GET", "HEAD", "OPTIONS")


class HeaderLimit:
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


class BodyLimit:
    """Reads the body, looks at it, and hands it on whole; refuses it where it is too much."""

    def __init__(self, app: ASGIApp, limits: RequestLimits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in _WITHOUT_BODY:
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        num_declared = int(declared) if declared.isdigit() else 0
        try:
            async with asyncio.timeout(self._limits.receive_timeout_s):
                body = await self._read(receive, num_declared)
        except TimeoutError:
            await refuse(send, self._too_slow())
            return
        except _Gone:
            return
        refusal = self._too_large() if body is None else self._excess(body)
        if refusal is not None:
            await refuse(send, refusal)
            return
        await self._app(scope, _once(body or b"", receive), send)

    async def _read(self, receive: Receive, num_declared: int) -> bytes | None:
        """The body; None where it is too large."""
        max_bytes = self._limits.max_body_bytes
        chunks, num_bytes, more = [], 0, True
        # Most clients read an answer only once they have sent their body: let them.
        while more and num_bytes <= MAX_DRAINED * max_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            chunk = message.get("body", b"")
            num_bytes += len(chunk)
            if max(num_bytes, num_declared) <= max_bytes:
                chunks.append(chunk)
            more = message.get("more_body", False)
        return b"".join(chunks) if max(num_bytes, num_declared) <= max_bytes else None

    def _too_large(self) -> Refusal:
        return Refusal(
            status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            message=f"The request body is larger than {self._limits.max_body_bytes} bytes.",
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
