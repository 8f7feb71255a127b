"""A progress bar on standard error, where that is a terminal; a line per task where it is not."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

_WIDTH = 30


def with_progress(items: Iterable[T], *, total: int, what: str) -> Iterator[T]:
    """Yields the items and shows how many of `total` are done: when asked for the next, one is."""
    for done, item in enumerate(items):
        _show(done, total, what)
        yield item
    _show(total, total, what)
    if sys.stderr.isatty():
        print(file=sys.stderr)


def _show(done: int, total: int, what: str) -> None:
    if sys.stderr.isatty():
        filled = _WIDTH * done // max(total, 1)
        bar = "█" * filled + "·" * (_WIDTH - filled)
        print(f"\r{what} {bar} {done}/{total}", end="", file=sys.stderr, flush=True)
    elif done == total:
        print(f"{what}: {total} done", file=sys.stderr)
