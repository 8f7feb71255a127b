"""Who notices that a client has gone: vLLM's handlers, and nobody else.

They read the disconnect themselves and abort the request in the engines. Serve would watch as well
and cancel the request's task: that does not reach the tasks in which vLLM's handlers run, so the
answer would be generated to its end for nobody; and its watching costs every request two tasks and
a queue. A header tells Serve to leave it. Serve's own HTTP proxy, in use where there is no HAProxy,
cancels all the same; then a cancel is held back until the app has ended by itself.
"""

import asyncio

from ray.serve._private.constants import SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

GRACE_S = 5.0
"""An app that does not end by itself is cancelled after this."""

_UNWATCHED = (SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER.encode(), b"?1")


class WatchesItself:
    """Outermost, before Serve sees a request: has Serve not watch the client."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["headers"] = [*scope["headers"], _UNWATCHED]
        await self._app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """What Serve puts around its own handling (`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`)."""
    return [Middleware(WatchesItself)]


class EndsByItself:
    """Shields the app from being cancelled; a cancel is passed on late, if at all."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if _UNWATCHED in scope.get("headers", ()):
            await self._app(scope, receive, send)
            return
        task = asyncio.ensure_future(self._app(scope, receive, send))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait([task], timeout=GRACE_S)
            task.cancel()
            raise
