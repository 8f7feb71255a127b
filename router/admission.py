"""An ASGI middleware that holds new requests while nobody could answer them.

vLLM's front end sends the status of a streamed answer before an engine is asked, so "not now" has
to be said before it. Never looks at bodies.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable

from starlette.types import ASGIApp, Receive, Scope, Send

RETRY_AFTER_S = 10
_NEEDS_NO_ENGINE = ("/tokenize", "/detokenize")


class WaitsForReplicas:
    """Waits for `ready` before the app sees a request; answers 503 where it takes too long."""

    def __init__(
        self, app: ASGIApp, ready: Callable[[], Awaitable[object]], max_wait_s: float
    ) -> None:
        self._app = app
        self._ready = ready
        self._max_wait_s = max_wait_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        generates = scope["type"] == "http" and scope["method"] == "POST"
        if generates and scope["path"] not in _NEEDS_NO_ENGINE:
            try:
                async with asyncio.timeout(self._max_wait_s):
                    await self._ready()
            except TimeoutError:
                await self._refuse(send)
                return
        await self._app(scope, receive, send)

    async def _refuse(self, send: Send) -> None:
        error = {
            "message": f"No decode replica was alive for {self._max_wait_s:g} s, try again.",
            "type": "ServiceUnavailableError",
            "param": None,
            "code": 503,
        }
        body = json.dumps({"error": error}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"retry-after", str(RETRY_AFTER_S).encode()),
        ]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": body})
