"""How a process's growth is read off its samples."""

import psutil
import pytest

from benchmarks.chaos_memory import MemoryWatch, growth_of


@pytest.mark.parametrize(
    ("taken", "expected"),
    [
        pytest.param([(at, 100) for at in range(100)], 0.0, id="steady"),
        pytest.param([(at, min(at, 30) + 70) for at in range(100)], 0.0, id="warms-up-and-stays"),
        pytest.param([(at, 100 + 2 * (at > 50)) for at in range(100)], 0.02, id="grows"),
        pytest.param([(at, 100) for at in range(50)], None, id="ended"),
        pytest.param([(at, min(at, 50)) for at in range(20, 100)], 0.0, id="warms-up-later"),
        pytest.param([(at, 100) for at in range(55, 100)], None, id="came-late"),
    ],
)
def test_growth_runs_from_the_warm_up_to_the_end(
    taken: list[tuple[float, int]], expected: float | None
) -> None:
    assert growth_of(taken, start_s=0.0, end_s=100.0) == pytest.approx(expected)


def test_processes_are_looked_at() -> None:
    child = psutil.Popen(["sleep", "60"])
    try:
        watch = MemoryWatch(psutil.Process())
        for at_s in (0.0, 35.0, 99.0):
            watch.look(at_s)
        grown = {each.title: each for each in watch.growths(start_s=0.0, end_s=100.0)}
    finally:
        child.kill()
        child.wait()
    watch.look(99.5)
    assert grown["sleep"].end_bytes > 0
    assert abs(grown["sleep"].fraction) < 0.5
