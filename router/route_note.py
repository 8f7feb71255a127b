"""What the router says of one HTTP request to whoever answers it.

Owns the context variable by which both find the note. Knows nothing of HTTP.
"""

from contextvars import ContextVar
from dataclasses import dataclass, field

from vllm.exceptions import GenerationError, VLLMError

from router.refusals import Refusal


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
