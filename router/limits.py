"""An ASGI middleware that answers 413 to a request body over the limit, keeping none of it."""

import json

from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_DRAINED = 16
"""How many times the limit is read and dropped before the connection is closed on the client."""


class BodyLimit:
    """Counts the body's bytes as they arrive; over the limit the app sees its client leave."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            await self._refuse(receive, send, more=True)
            return
        num_bytes = 0
        is_refused = False

        async def counted() -> Message:
            nonlocal num_bytes, is_refused
            if is_refused:
                return {"type": "http.disconnect"}
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes <= self._max_bytes:
                return message
            is_refused = True
            await self._refuse(receive, send, more=message.get("more_body", False))
            return {"type": "http.disconnect"}

        async def unless_refused(message: Message) -> None:
            if not is_refused:
                await send(message)

        await self._app(scope, counted, unless_refused)

    async def _refuse(self, receive: Receive, send: Send, *, more: bool) -> None:
        # Most clients read the answer only once they have sent their body: let them.
        num_bytes = 0
        while more and num_bytes < MAX_DRAINED * self._max_bytes:
            message = await receive()
            num_bytes += len(message.get("body", b""))
            more = message.get("more_body", False)
        error = {
            "message": f"The request body is larger than {self._max_bytes} bytes.",
            "type": "BadRequestError",
            "param": None,
            "code": 413,
        }
        body = json.dumps({"error": error}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": body})
