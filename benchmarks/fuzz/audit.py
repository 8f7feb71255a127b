"""Whether the cluster holds anything that nobody asked for. Owns what counts as nothing."""

import asyncio
import time
from typing import Protocol

from benchmarks.chaos_metrics import Scrape

_POLL_S = 0.25


class Asked(Protocol):
    """The cluster's routers, as `benchmarks.chaos_routers` asks them."""

    async def look(self) -> Scrape | None: ...
    async def audit(self) -> tuple[str, ...]: ...


async def audit(
    routers: Asked, *, within_s: float, known: frozenset[str] = frozenset()
) -> tuple[str, ...]:
    """What is still held after `within_s` of rest, one line each; empty as soon as it is nothing.

    It does not wait for the lines that are `known` to be held for good.
    """
    deadline_s = time.monotonic() + within_s
    while True:
        seen = await routers.look()
        held = ("no router answers",) if seen is None else (*seen.held, *await routers.audit())
        if known.issuperset(held) or time.monotonic() >= deadline_s:
            return held
        await asyncio.sleep(_POLL_S)
