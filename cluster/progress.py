"""What Ray Serve says about an application that starts, in one line.

Owns reading Serve's REST status; the rest is pure. Never changes anything there.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from cluster.local_http import OPENER
from router.serve_messages import one_line

_FAILED = "DEPLOY_FAILED"
"""Serve has given up. UNHEALTHY it calls also what it is about to replace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A snapshot of an application that starts."""

    summary: str
    trouble: str | None = None
    """What Serve says is wrong, in one line, even if it will try again."""
    failed: bool = False
    """Serve has given up."""


NOT_YET = Progress(summary="Serve is starting")


def observe_progress(dashboard_url: str, app_name: str, *, timeout_s: float) -> Progress:
    """The application's state according to Serve; `NOT_YET` while nobody answers."""
    try:
        with OPENER.open(f"{dashboard_url}/api/serve/applications/", timeout=timeout_s) as response:
            return read_progress(json.load(response), app_name)
    except (OSError, HTTPException, json.JSONDecodeError):
        return NOT_YET


def read_progress(details: Mapping[str, Any], app_name: str) -> Progress:
    """Reads the answer of Serve's `GET /api/serve/applications/`."""
    application = details.get("applications", {}).get(app_name)
    if application is None:
        return NOT_YET
    deployments = application.get("deployments", {})
    counts = [f"{name} {_count(each)}" for name, each in sorted(deployments.items())]
    # The application's own message repeats what its deployments say, with more words around it.
    reports = [*deployments.values(), application]
    troubles = (one_line(each.get("message", "")) for each in reports)
    return Progress(
        summary=", ".join(counts) or "the application is being built",
        trouble=next(filter(None, troubles), None),
        failed=application.get("status") == _FAILED,
    )


def _count(deployment: Mapping[str, Any]) -> str:
    running = [each for each in deployment.get("replicas", ()) if each.get("state") == "RUNNING"]
    return f"{len(running)}/{deployment.get('target_num_replicas', '?')}"
