"""What Serve sees of a client's headers: nothing.

Serve takes orders from them (a time limit, an id, the model of a multiplexed replica, whether to
watch the client) and fails where their bytes are not UTF-8. The app gets them as they came, so it
does with them what vLLM's own server does. Owns the header that tells Serve not to watch the
client: see router.cancellation.
"""

from collections.abc import Iterable

from ray.serve._private.constants import SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

Headers = list[tuple[bytes, bytes]]

MAX_ID_BYTES = 256
"""Of the id that a client gives a request."""
REQUEST_ID = b"x-request-id"
_UNWATCHED = (SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER.encode(), b"?1")
_KEPT = "pdserve.client_headers"
"""Where a request's scope keeps them on its way through Serve."""


class HeaderHidingMiddleware:
    """Outermost, before Serve sees a request: takes the client's headers out of its sight."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "headers" not in scope:
            await self._app(scope, receive, send)
            return
        headers: Headers = scope["headers"]
        scope[_KEPT], scope["headers"] = headers, [_UNWATCHED]
        client_id = dict(headers).get(REQUEST_ID)

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                told = with_one_id(message.get("headers", ()), client_id)
                message = {**message, "headers": told}
            await send(message)

        await self._app(scope, receive, named)


class ClientHeadersMiddleware:
    """Gives the app the headers that its client sent."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if _KEPT in scope:
            scope["headers"] = scope.pop(_KEPT)
        await self._app(scope, receive, send)


def with_one_id(headers: Iterable[tuple[bytes, bytes]], client_id: bytes | None) -> Headers:
    """An answer's headers with one request id: the client's, or else the first that it has."""
    kept: Headers = []
    ids = [client_id] if client_id is not None and len(client_id) <= MAX_ID_BYTES else []
    for name, value in headers:
        if bytes(name).lower() == REQUEST_ID:
            ids.append(value)
        else:
            kept.append((name, value))
    return [*kept, *((REQUEST_ID, each) for each in ids[:1])]


def middlewares() -> list[Middleware]:
    """What Serve puts around its own handling (`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`)."""
    return [Middleware(HeaderHidingMiddleware)]
