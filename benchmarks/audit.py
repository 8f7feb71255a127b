"""Asks a router whether it and its replicas agree on what they hold.

Owns how it is asked. What is compared is `router.audit`'s business.
"""

import httpx

_TIMEOUT_S = 15.0


async def audit(url: str) -> tuple[str, ...]:
    """What does not agree, and what is still running, a line each; empty where nothing is left."""
    try:
        async with httpx.AsyncClient(timeout=_TIMEOUT_S) as client:
            answer = await client.get(f"{url}/audit")
            found = answer.json()
            lines = tuple(found["disagreements"])
            num_requests = found["num_requests"]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        return (f"no audit: {error!r}",)
    return (*lines, f"{num_requests} requests are running") if num_requests else lines
