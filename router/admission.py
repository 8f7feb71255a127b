"""An ASGI middleware that holds new requests while nobody could answer them.

vLLM's front end sends the status of a streamed answer before an engine is asked, so "not now" has
to be said before it. Never looks at bodies.
"""

import asyncio
from collections.abc import Awaitable, Callable
from http import HTTPStatus

from starlette.types import ASGIApp, Receive, Scope, Send

from router.admit import AdmissionPlan
from router.answers import Refusal, refuse

RETRY_AFTER_S = 10
_NEEDS_NO_ENGINE = ("/tokenize", "/detokenize")


def unavailable(message: str) -> Refusal:
    """Status 503: what is missing may come back."""
    return Refusal(
        status=HTTPStatus.SERVICE_UNAVAILABLE, message=message, retry_after_s=RETRY_AFTER_S
    )


def bad_request(message: str) -> Refusal:
    """Status 400: it will not be taken later either."""
    return Refusal(status=HTTPStatus.BAD_REQUEST, message=message)


def too_many(plan: AdmissionPlan) -> Refusal:
    """Status 429: there is more to do than can be done in time."""
    return Refusal(
        status=HTTPStatus.TOO_MANY_REQUESTS,
        message=f"The cluster is too busy ({plan.reason}), try again in {plan.retry_after_s} s.",
        retry_after_s=plan.retry_after_s,
    )


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
                message = f"No decode replica was alive for {self._max_wait_s:g} s, try again."
                await refuse(send, unavailable(message))
                return
        await self._app(scope, receive, send)
