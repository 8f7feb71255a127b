"""When an audit is content, and how long it waits."""

from collections.abc import Iterator

import pytest

from benchmarks.chaos_metrics import Scrape
from benchmarks.fuzz.audit import audit

LONG_S = 3_600.0
"""Whoever waited for this would be seen to."""


class FakeRouters:
    """Routers that say one thing after the other, and the last for ever."""

    def __init__(self, *looks: tuple[str, ...] | None) -> None:
        self._looks: Iterator[tuple[str, ...] | None] = iter(looks)
        self._last: tuple[str, ...] | None = None
        self.disagreements: tuple[str, ...] = ()

    async def look(self) -> Scrape | None:
        self._last = next(self._looks, self._last)
        if self._last is None:
            return None
        return Scrape(num_live={}, held=self._last, moves={}, num_moves=None)

    async def audit(self) -> tuple[str, ...]:
        return self.disagreements


@pytest.mark.parametrize(
    ("routers", "known"),
    [
        pytest.param(FakeRouters(()), set(), id="nothing is held"),
        pytest.param(FakeRouters(("a",), ()), set(), id="it is let go"),
        pytest.param(FakeRouters(None, ()), set(), id="a router comes back"),
        pytest.param(FakeRouters(("a", "b"), ("a",)), {"a"}, id="what is known is held for good"),
    ],
)
async def test_it_waits_until_nothing_new_is_held(routers: FakeRouters, known: set[str]) -> None:
    held = await audit(routers, within_s=LONG_S, known=frozenset(known))
    assert set(held) == known


@pytest.mark.parametrize(
    ("routers", "held"),
    [
        pytest.param(FakeRouters(("a",)), ("a",), id="held"),
        pytest.param(FakeRouters(None), ("no router answers",), id="no router"),
    ],
)
async def test_it_says_what_is_held_when_the_time_is_up(
    routers: FakeRouters, held: tuple[str, ...]
) -> None:
    assert await audit(routers, within_s=0.0) == held


async def test_disagreements_are_held_too() -> None:
    routers = FakeRouters(())
    routers.disagreements = ("the ledger has one more",)
    assert await audit(routers, within_s=0.0) == ("the ledger has one more",)
