"""An ASGI middleware that holds an answer's status back until its body begins.

vLLM's front end sends the status of a streamed answer before an engine is asked. Held back until
the first token, it can still become a refusal, and the headers can tell the way that was taken.
"""

import json
import logging
from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import GenerationError, VLLMError

logger = logging.getLogger(__name__)

ROUTE_HEADER = b"x-pdserve-route"
MAX_MESSAGE_BYTES = 8 * 1024
"""Of each text in an error: vLLM tells back what it was given, however much that was."""

_ERROR_EVENT = b'data: {"error"'
_BEFORE_AN_ENGINE_IS_ASKED = (b"event: response.created\n", b"event: response.in_progress\n")
"""With these a stream of the Responses API begins."""
_BAD_REQUEST = frozenset({400, 408, 413, 431})


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a request gets no answer, and when to come back."""

    status: HTTPStatus
    message: str
    param: str | None = None
    retry_after_s: int | None = None
    closes: bool = False
    """The connection: what else comes on it is not worth reading."""


@dataclass(slots=True)
class RouteNote:
    """What the core client says of one HTTP request. Owned by the middleware."""

    routes: list[str] = field(default_factory=list)
    """Ways of its completions up to its first token, each said once."""
    refusal: Refusal | None = None
    error: VLLMError | None = None
    """Why the front end has not taken it, or an engine has failed with it."""
    num_prompt_logprobs: int = 0
    """Log probabilities of prompts' tokens that it has asked for so far."""


NOTE: ContextVar[RouteNote | None] = ContextVar("pdserve_route_note", default=None)
"""Of the HTTP request that is being answered in this context."""


def note_route(note: RouteNote | None, route: str) -> None:
    if note is not None and route not in note.routes:
        note.routes.append(route)


def note_failure(note: RouteNote | None) -> None:
    """An answer ends with an error; where nothing of it has been sent, that is its status."""
    if note is not None and note.error is None:
        note.error = GenerationError()


class TellsRoute:
    """Adds the header `x-pdserve-route`, and answers refusals and errors with their status."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        note = RouteNote()
        NOTE.set(note)
        answer = _Answer(note, send)
        try:
            await self._app(scope, receive, answer.send)
        except Exception as error:
            if await answer.refuse():
                return
            # vLLM's own handlers give up where the status has been sent, which it has not been.
            if not answer.is_held:
                raise
            logger.exception("A stream has failed before it began.")
            await answer.fail(error)
        else:
            await answer.refuse()


class _Answer:
    """One answer on its way to the client. Owns what is held back of it."""

    def __init__(self, note: RouteNote, send: Send) -> None:
        self._note = note
        self._send = send
        self._start: Message | None = None
        self._opening: list[Message] = []
        """What comes of the body before an engine is asked."""
        self._error: bytes | None = None
        """The body of an error so far."""
        self._has_begun = False
        self._is_over = False

    @property
    def is_held(self) -> bool:
        """Whether the app has begun to answer and its client has been sent nothing."""
        return self._start is not None

    async def refuse(self) -> bool:
        """Whether the core client has refused the request, and its client has been told only now.

        What the app makes of a refusal is not what clients are to read, and may be an exception.
        """
        if self._note.refusal is None or self._has_begun or self._is_over:
            return False
        self._end()
        await refuse(self._send, self._note.refusal)
        return True

    async def fail(self, error: Exception) -> None:
        """Ends an answer that is held with an error, as vLLM would have without a stream."""
        told = _error_response(error)
        self._end()
        await _send_json(self._send, told.error.code, json.loads(shortened(told.model_dump_json())))

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
        elif self._start is not None:
            await self._begin(self._start, message)
        elif not self._is_over:
            await self._send(message)

    async def _begin(self, start: Message, message: Message) -> None:
        """The body begins: what the answer is to be is known."""
        body = message.get("body", b"")
        if await self.refuse():
            return
        if self._note.error is not None and _has_type(start, b"text/event-stream"):
            # Whatever the stream begins with: that of a chat may be a chunk before its error.
            await self.fail(self._note.error)
        elif (told := error_event(body)) is not None:
            self._end()
            await _send_json(self._send, told["error"]["code"], told)
        elif start["status"] >= HTTPStatus.BAD_REQUEST and _has_type(start, b"application/json"):
            self._error = (self._error or b"") + body
            if not message.get("more_body", False):
                self._end()
                await self._send_error(start, self._error)
        elif body.startswith(_BEFORE_AN_ENGINE_IS_ASKED) and message.get("more_body", False):
            self._opening.append(message)
        else:
            self._start = None
            self._has_begun = True
            await self._send(self._told(start))
            for each in (*self._opening, message):
                await self._send(each)

    def _end(self) -> None:
        self._start = None
        self._is_over = True

    def _told(self, start: Message) -> Message:
        if not self._note.routes:
            return start
        told = (ROUTE_HEADER, ", ".join(self._note.routes).encode())
        return {**start, "headers": [*start.get("headers", ()), told]}

    async def _send_error(self, start: Message, body: bytes) -> None:
        if len(body) > MAX_MESSAGE_BYTES:
            body = shortened(body)
            kept = [each for each in start["headers"] if each[0] != b"content-length"]
            length = (b"content-length", str(len(body)).encode())
            start = {**start, "headers": [*kept, length]}
        await self._send(self._told(start))
        await self._send({"type": "http.response.body", "body": body})


def _error_response(error: Exception) -> ErrorResponse:
    """vLLM's word for its own errors, each of which says whose it is.

    It takes any other `ValueError` for the client's, which is not where one is thrown this late.
    """
    # Starlette wraps one that it has a handler for and no more use of.
    known = next((each for each in (error, error.__cause__) if isinstance(each, VLLMError)), None)
    if known is not None:
        return create_error_response(known)
    return create_error_response(
        "Internal server error", "InternalServerError", HTTPStatus.INTERNAL_SERVER_ERROR
    )


def error_event(body: bytes) -> dict[str, Any] | None:
    """The error that a stream begins with; it has not begun then."""
    if not body.startswith(_ERROR_EVENT):
        return None
    told: dict[str, Any] = json.loads(body.removeprefix(b"data: ").partition(b"\n")[0])
    error = told["error"]
    if isinstance(error, dict):
        error["message"] = _cut(error.get("message"))
        if isinstance(error.get("code"), int) and error["code"] >= HTTPStatus.BAD_REQUEST:
            return told
    return None


def shortened(body: bytes | str) -> bytes:
    """An error of vLLM's with the texts in it cut."""
    told = json.loads(body)
    if isinstance(told, dict) and isinstance(told.get("error"), dict):
        told["error"] = {name: _cut(value) for name, value in told["error"].items()}
    return json.dumps(told, ensure_ascii=False).encode()


def _cut(value: Any) -> Any:
    text = value.encode(errors="replace") if isinstance(value, str) else b""
    if len(text) <= MAX_MESSAGE_BYTES:
        return value
    return f"{text[:MAX_MESSAGE_BYTES].decode(errors='ignore')} ... ({len(text)} bytes)"


def _has_type(start: Message, content_type: bytes) -> bool:
    return any(
        name == b"content-type" and value.startswith(content_type)
        for name, value in start.get("headers", ())
    )


async def refuse(send: Send, refusal: Refusal) -> None:
    """Answers a request with a refusal, in the form of an OpenAI error."""
    code = refusal.status.value
    kind = "BadRequest" if code in _BAD_REQUEST else refusal.status.phrase.replace(" ", "")
    error = {
        "message": refusal.message,
        "type": f"{kind}Error",
        "param": refusal.param,
        "code": code,
    }
    headers = []
    if refusal.retry_after_s is not None:
        headers.append((b"retry-after", str(refusal.retry_after_s).encode()))
    if refusal.closes:
        headers.append((b"connection", b"close"))
    await _send_json(send, code, {"error": error}, headers)


async def _send_json(
    send: Send, status: int, told: object, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    body = json.dumps(told).encode()
    length = (b"content-length", str(len(body)).encode())
    head = [(b"content-type", b"application/json"), length, *(headers or ())]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})
