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


class CancellationShield:
    """Shields the app from being cancelled; a cancel is passed on late, if at all."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_left = False

        async def unless_left(message: Message) -> None:
            if not has_left:
                await send(message)

        task = asyncio.ensure_future(self._app(scope, receive, unless_left))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            # Serve answers in the app's place, or closes the connection: the app hears of it.
            has_left = True
            await asyncio.wait([task], timeout=GRACE_S)
            task.cancel()
            raise
