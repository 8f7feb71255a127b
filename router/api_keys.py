"""Who may ask: whoever has one of the keys of `router.frontend.api_key`, where it is set.

vLLM guards a list of paths and leaves the others open, among them some that generate. Owns the
list of those that stay open: they only tell how the router is.
"""

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

OPEN_PATHS = frozenset({"/health", "/ping", "/metrics", "/load", "/version"})
_HAS_KEY = "pdserve.has_key"


class ApiKeyMiddleware(AuthenticationMiddleware):  # type: ignore[misc]
    """Answers 401, as vLLM does, to whoever has no key; on every path that does anything."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan" and scope.get("method") != "OPTIONS":
            scope[_HAS_KEY] = self.verify_token(Headers(scope=scope))
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if not scope[_HAS_KEY] and path not in OPEN_PATHS:
                refusal = JSONResponse({"error": "Unauthorized"}, status_code=401)
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)


def has_key(scope: Scope) -> bool:
    """Whether the client may be told everything: it has a key, or none is needed."""
    return bool(scope.get(_HAS_KEY, True))
