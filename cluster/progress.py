"""What Ray Serve says about an application that starts, in one line.

Owns reading Serve's REST status; the rest is pure. Never changes anything there.
"""

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The services asked are on this machine, whatever proxy the environment names.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_FAILED = ("DEPLOY_FAILED", "UNHEALTHY")


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A snapshot of an application that starts."""

    summary: str
    trouble: str | None = None
    """What Serve says is wrong, possibly over several lines, even if it will try again."""
    failed: bool = False
    """Serve has given up."""


NOT_YET = Progress(summary="Serve is starting")


def observe_progress(dashboard_url: str, app_name: str, *, timeout_s: float) -> Progress:
    """The application's state according to Serve; `NOT_YET` while nobody answers."""
    try:
        with _OPENER.open(
            f"{dashboard_url}/api/serve/applications/", timeout=timeout_s
        ) as response:
            return read_progress(json.load(response), app_name)
    except (OSError, json.JSONDecodeError):
        return NOT_YET


def is_healthy(url: str, *, timeout_s: float) -> bool:
    """Whether the router answers that both pools can serve."""
    try:
        with _OPENER.open(f"{url}/health", timeout=timeout_s) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def read_progress(details: Mapping[str, Any], app_name: str) -> Progress:
    """Reads the answer of Serve's `GET /api/serve/applications/`."""
    application = details.get("applications", {}).get(app_name)
    if application is None:
        return NOT_YET
    deployments = application.get("deployments", {})
    counts = [f"{name} {_count(each)}" for name, each in sorted(deployments.items())]
    # What a deployment says is often repeated by the application.
    reports = [application, *deployments.values()]
    messages = dict.fromkeys(each.get("message", "").strip() for each in reports)
    return Progress(
        summary=", ".join(counts) or "the application is being built",
        trouble="\n".join(message for message in messages if message) or None,
        failed=application.get("status") in _FAILED,
    )


def _count(deployment: Mapping[str, Any]) -> str:
    running = [each for each in deployment.get("replicas", ()) if each.get("state") == "RUNNING"]
    return f"{len(running)}/{deployment.get('target_num_replicas', '?')}"
