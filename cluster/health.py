"""What a router's `/health` says, read.

Owns the reading; router.health owns the form.
"""

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from cluster.local_http import OPENER


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """A look at a router."""

    is_open: bool = False
    """Whether each pool has a live replica."""
    last_engine_end: str | None = None
    """The last engine that ended, and how, in one line."""
    ended_at_s: float = 0.0
    last_fault: str | None = None
    """The last fault of a replica that is none of its engine's end."""
    fault_at_s: float = 0.0


UNREACHED = Health()


def observe_health(url: str, *, timeout_s: float, key: str | None = None) -> Health:
    """What the router behind `url` says; `UNREACHED` while nobody answers.

    Without a key, where one is needed, it does not say how an engine ended.
    """
    headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
    request = urllib.request.Request(f"{url}/health", headers=headers)
    try:
        with OPENER.open(request, timeout=timeout_s) as response:
            return read_health(response.status, response.read())
    except urllib.error.HTTPError as error:
        return _read_error(error)
    except (OSError, HTTPException):
        return UNREACHED


def _read_error(error: urllib.error.HTTPError) -> Health:
    try:
        return read_health(error.code, error.read())
    except (OSError, HTTPException):  # it broke off
        return UNREACHED


def read_health(status: int, body: bytes) -> Health:
    """Reads an answer; one that is not a router's says nothing but its status."""
    is_open = status == 200
    try:
        said: Any = json.loads(body)
        end: dict[str, Any] = said.get("last_engine_end", {})
        fault: dict[str, Any] = said.get("last_fault", {})
    except (ValueError, AttributeError):
        end = fault = {}
    if fault.get("fault") == "engine_ended":
        fault = {}
    return Health(
        is_open=is_open,
        last_engine_end=end.get("message"),
        ended_at_s=float(end.get("at_s") or 0.0),
        last_fault=fault.get("message"),
        fault_at_s=float(fault.get("at_s") or 0.0),
    )
