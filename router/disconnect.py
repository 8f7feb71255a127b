"""Who notices that a client has gone: vLLM's handlers, and nobody else.

They read the disconnect themselves and abort the request in the engines. Serve would watch as well
and cancel the request's task: that does not reach the tasks in which vLLM's handlers run, so the
answer would be generated to its end for nobody; and its watching costs every request two tasks and
a queue. A header tells Serve to leave it: see router.client_headers. It cancels all the same where
`http_options.request_timeout_s` ends a request, and where there is no HAProxy.
"""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

GRACE_S = 5.0
"""An app that does not end by itself is cancelled after this."""


class EndsByItself:
    """Makes of a cancel a client that has gone; passes it on late, if at all."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        client = _Client(receive, send)
        task = asyncio.ensure_future(self._app(scope, client.receive, client.send))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            client.leave()
            await asyncio.wait([task], timeout=GRACE_S)
            task.cancel()
            raise


class _Client:
    """The client as the app sees it. Owns whether it has gone."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._has_gone = False
        self._asked: asyncio.Future[Message] | None = None

    async def receive(self) -> Message:
        if not self._has_gone:
            self._asked = asyncio.ensure_future(self._receive())
            try:
                return await self._asked
            except asyncio.CancelledError:
                if not self._has_gone:
                    raise
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if not self._has_gone:
            await self._send(message)

    def leave(self) -> None:
        self._has_gone = True
        if self._asked is not None:
            self._asked.cancel()
