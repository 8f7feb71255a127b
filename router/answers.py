"""An ASGI middleware that holds an answer's status back until its body begins.

vLLM's front end sends the status of a streamed answer before an engine is asked. Held back until
the first token, it can still become a refusal, and the headers can tell the way that was taken.
Never looks at bodies.
"""

import json
from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

ROUTE_HEADER = b"x-pdserve-route"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a request gets no answer, and when to come back."""

    status: HTTPStatus
    message: str
    retry_after_s: int | None = None
    """None where coming back does not help."""


@dataclass(slots=True)
class RouteNote:
    """What the core client says of one HTTP request. Owned by the middleware."""

    routes: list[str] = field(default_factory=list)
    """Ways of its completions up to its first token, each said once."""
    refusal: Refusal | None = None


NOTE: ContextVar[RouteNote | None] = ContextVar("pdserve_route_note", default=None)
"""Of the HTTP request that is being answered in this context."""


def note_route(note: RouteNote | None, route: str) -> None:
    if note is not None and route not in note.routes:
        note.routes.append(route)


class TellsRoute:
    """Adds the header `x-pdserve-route`, and answers refusals with their status."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        note = RouteNote()
        NOTE.set(note)
        start: Message | None = None
        is_refused = False

        async def held(message: Message) -> None:
            nonlocal start, is_refused
            if message["type"] == "http.response.start":
                start = message
                return
            if start is not None:
                opening, start = start, None
                if note.refusal is not None:
                    is_refused = True
                    await refuse(send, note.refusal)
                    return
                if note.routes:
                    told = (ROUTE_HEADER, ", ".join(note.routes).encode())
                    opening = {**opening, "headers": [*opening.get("headers", ()), told]}
                await send(opening)
            if not is_refused:
                await send(message)

        await self._app(scope, receive, held)


async def refuse(send: Send, refusal: Refusal) -> None:
    """Answers a request with a refusal, in the form of an OpenAI error."""
    error = {
        "message": refusal.message,
        "type": refusal.status.phrase.replace(" ", "") + "Error",
        "param": None,
        "code": refusal.status.value,
    }
    body = json.dumps({"error": error}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    if refusal.retry_after_s is not None:
        headers.append((b"retry-after", str(refusal.retry_after_s).encode()))
    await send({"type": "http.response.start", "status": refusal.status.value, "headers": headers})
    await send({"type": "http.response.body", "body": body})
