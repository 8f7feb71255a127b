"""The errors of the router package.

RouterError
├── NoReplica               a pool has no live replica
├── CannotBeSent            a request holds what no message to an engine can
├── FrontEndStalled         nobody reads the outputs that the engines send
├── SandboxUnavailable      a client's grammar or template cannot be looked at now
├── TaskRefused             it was looked at, and is not taken
└── RouterInternalsChanged  vLLM or Ray is not the version whose internals we call
"""


class RouterError(Exception):
    """Any error of this package."""


class NoReplica(RouterError):
    """A pool was asked for a replica and has no live one."""

    def __init__(self, pool: str) -> None:
        super().__init__(f"no {pool} replica is alive")


class CannotBeSent(RouterError):
    """A request holds what no message to an engine can: a number beyond 64 bits, half a letter."""

    def __init__(self, error: Exception) -> None:
        super().__init__(f"The request cannot be sent to an engine: {error}")


class FrontEndStalled(RouterError):
    """Nobody reads the outputs that the engines send, so no client gets an answer."""


class SandboxUnavailable(RouterError):
    """What a client sent cannot be looked at now; later it may."""

    def __init__(self) -> None:
        super().__init__("too many grammars, schemas and templates are being checked: try again")


class TaskRefused(RouterError):
    """A grammar, schema or template that is not taken: it is wrong, or costs too much."""

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.parameter = parameter
        """The field of the request, where it is known."""


class RouterInternalsChanged(RouterError):
    """A name inside vLLM or Ray that this package relies on is missing."""
