"""An ASGI middleware that lets the app end its own work when its client has gone.

Serve cancels a request's task on disconnect. vLLM's handlers run in tasks of their own, which that
cancel does not reach: the answer would be generated to its end for nobody. They do end their work,
and abort it in the engines, when they read the disconnect themselves; so they are given the time.
"""

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send

GRACE_S = 5.0
"""An app that does not end by itself is cancelled after this."""


class EndsByItself:
    """Shields the app from being cancelled; a cancel is passed on late, if at all."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.ensure_future(self._app(scope, receive, send))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait([task], timeout=GRACE_S)
            task.cancel()
            raise
