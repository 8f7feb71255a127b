"""Which client a request is from, as far as a router can tell: by its key and its address.

Owns the header in which HAProxy says the address, and takes it out again. Decides nothing: whoever
shares something out among clients asks here.
"""

from contextvars import ContextVar

from starlette.types import ASGIApp, Receive, Scope, Send

ADDRESS = "x-pdserve-client"
"""HAProxy puts it behind whatever the client has sent (`cluster.haproxy`)."""
_ADDRESS = ADDRESS.encode()

CLIENT: ContextVar[str] = ContextVar("pdserve_client", default="")
"""Of the HTTP request that is being answered in this context."""


class ClientIdentityMiddleware:
    """Says whose request is being answered."""

    def __init__(self, app: ASGIApp, *, has_keys: bool) -> None:
        """`has_keys`: a key is asked for, so that none of a client's invention gets far."""
        self._app = app
        self._has_keys = has_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = scope["headers"]
            CLIENT.set(client_of(scope, has_keys=self._has_keys))
            scope["headers"] = [each for each in headers if each[0] != _ADDRESS]
        await self._app(scope, receive, send)


def client_of(scope: Scope, *, has_keys: bool) -> str:
    """A name for whoever has sent a request; equal for all requests that may be one client's."""
    headers = scope["headers"]
    host, *_ = scope.get("client") or ("",)
    address = dict(headers).get(_ADDRESS, host.encode())  # the last of its name: HAProxy's
    if not has_keys:
        return f"{address!r}"
    # As `ApiKeyMiddleware` reads it: of the first, what comes behind the scheme.
    authorization = next((value for name, value in headers if name == b"authorization"), b"")
    return f"{address!r} {authorization.partition(b' ')[2]!r}"
