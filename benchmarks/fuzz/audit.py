"""Whether the cluster holds anything that nobody asked for. Owns what counts as nothing."""

import asyncio
import time

from benchmarks.chaos_routers import Routers

_POLL_S = 0.25


async def audit(
    routers: Routers, *, within_s: float, known: frozenset[str] = frozenset()
) -> tuple[str, ...]:
    """What is still held after `within_s` of rest, one line each; empty as soon as it is nothing.

    It does not wait for the lines that are `known` to be held for good.
    """
    deadline_s = time.monotonic() + within_s
    held: tuple[str, ...] = ("no router answers",)
    while True:
        seen = await routers.look()
        if seen is not None:
            held = (*seen.held, *await routers.audit())
        if known.issuperset(held) or time.monotonic() >= deadline_s:
            return held
        await asyncio.sleep(_POLL_S)
