"""What a router's metrics say of pairs that are not ready."""

import pytest

from benchmarks.fuzz.aftermath import unready_pairs


@pytest.mark.parametrize(
    ("metrics", "num"),
    [
        pytest.param("", 0, id="not counted"),
        pytest.param("# TYPE pdserve_unready_pairs gauge\npdserve_unready_pairs 0.0\n", 0, id="0"),
        pytest.param("# TYPE pdserve_unready_pairs gauge\npdserve_unready_pairs 2.0\n", 2, id="2"),
    ],
)
def test_unready_pairs(metrics: str, num: float) -> None:
    assert unready_pairs(metrics) == num
