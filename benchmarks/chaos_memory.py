"""How much memory each of the cluster's processes takes, over a run. Owns the samples.

Only a process that lives from the end of its warm-up to the end of the run can be seen to grow; in
a run with faults these are the routers that were spared, the proxy, and Ray's own.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil

WARM_UP = 0.3
"""Share of the run in which the caches and pools of a process fill, once it has started."""
WINDOW = 0.1
"""Share of the run whose median stands for a moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """One process's: `fraction` is 0.01 where it takes one percent more at the end."""

    title: str
    fraction: float
    end_bytes: int


@dataclass(frozen=True, slots=True)
class _Taken:
    at_s: float
    num_bytes: int


class MemoryWatch:
    """The resident memory of the processes below `leader`, as often as it is looked at."""

    def __init__(self, leader: psutil.Process) -> None:
        self._leader = leader
        self._taken: dict[tuple[int, float], list[_Taken]] = defaultdict(list)
        self._titles: dict[tuple[int, float], str] = {}

    def look(self, now_s: float) -> None:
        """Takes one sample of each process."""
        for process in self._leader.children(recursive=True):
            try:
                key = (process.pid, process.create_time())
                num_bytes = process.memory_info().rss
                title = _title(process)
            except psutil.NoSuchProcess:
                continue
            self._titles[key] = title
            self._taken[key].append(_Taken(now_s, num_bytes))

    def growths(self, *, start_s: float, end_s: float) -> tuple[Growth, ...]:
        """Of each process that has lived long enough, those that grew most first."""
        found = []
        for key, taken in self._taken.items():
            fraction = growth_of(
                [(each.at_s, each.num_bytes) for each in taken], start_s=start_s, end_s=end_s
            )
            if fraction is not None:
                found.append(
                    Growth(
                        title=self._titles[key], fraction=fraction, end_bytes=taken[-1].num_bytes
                    )
                )
        return tuple(sorted(found, key=lambda each: -each.fraction))


def _title(process: psutil.Process) -> str:
    """What it calls itself, or its program, without the folder; of Python, what that runs."""
    words = [Path(word).name for word in " ".join(process.cmdline()).split()] or [process.name()]
    return " ".join(words[:2] if words[0].startswith("python") else words[:1])


def growth_of(taken: Iterable[tuple[float, int]], *, start_s: float, end_s: float) -> float | None:
    """From after the warm-up to the end; None for a process that was not there at both.

    Args:
        taken: times and bytes, from its start on.
    """
    length_s = end_s - start_s
    samples = list(taken)
    began_s = max(start_s, min((at_s for at_s, _ in samples), default=start_s))
    warm_s, last_s = began_s + WARM_UP * length_s, end_s - WINDOW * length_s
    if warm_s + WINDOW * length_s > last_s:
        return None
    first = [size for at_s, size in samples if warm_s <= at_s < warm_s + WINDOW * length_s]
    last = [size for at_s, size in samples if last_s <= at_s <= end_s]
    return median(last) / median(first) - 1 if first and last else None
