"""The errors of the router package.

RouterError
├── NoReplica               a pool has no live replica
└── RouterInternalsChanged  vLLM or Ray is not the version whose internals we call
"""

from http import HTTPStatus

from vllm.exceptions import GracefulHTTPError


class RouterError(Exception):
    """Any error of this package."""


class NoReplica(RouterError, GracefulHTTPError):  # type: ignore[misc]
    """A pool has no live replica. vLLM's front end turns it into status 503."""

    def __init__(self, pool: str) -> None:
        GracefulHTTPError.__init__(
            self, f"no {pool} replica is alive, try again", HTTPStatus.SERVICE_UNAVAILABLE
        )


class RouterInternalsChanged(RouterError):
    """A name inside vLLM or Ray that this package relies on is missing."""
