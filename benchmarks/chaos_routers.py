"""The cluster's routers, each asked on its own port, past the proxy in front of them.

Owns the last look at every router that there was: what a dead one has counted is not forgotten.
"""

import asyncio

import psutil

from benchmarks.audit import audit
from benchmarks.chaos_metrics import Scrape, scrape, together
from benchmarks.chaos_processes import RouterProcess, find_routers


class Routers:
    """The routers below `leader`, of which there should be `num_expected`."""

    def __init__(self, leader: psutil.Process, *, num_expected: int) -> None:
        self._leader = leader
        self._num_expected = num_expected
        self._last: dict[int, Scrape] = {}
        self.live: tuple[RouterProcess, ...] = ()
        """Those that answered the last look."""

    @property
    def are_complete(self) -> bool:
        """Whether all that there should be answered the last look."""
        return len(self.live) == self._num_expected

    async def look(self) -> Scrape | None:
        """What they say together; None if none of them answers now."""
        known = self.live if self.are_complete else find_routers(self._leader)
        looks = await asyncio.gather(*(scrape(router.port) for router in known))
        seen = {router: each for router, each in zip(known, looks, strict=True) if each is not None}
        self.live = tuple(seen)
        self._last.update({router.pid: each for router, each in seen.items()})
        silent = [each for pid, each in self._last.items() if pid not in _pids(self.live)]
        return together(list(seen.values()), silent)

    async def audit(self) -> tuple[str, ...]:
        """What does not agree or is still running, a line each."""
        found = await asyncio.gather(
            *(audit(f"http://127.0.0.1:{router.port}") for router in self.live)
        )
        return tuple(dict.fromkeys(line for lines in found for line in lines))


def _pids(routers: tuple[RouterProcess, ...]) -> set[int]:
    return {router.pid for router in routers}
