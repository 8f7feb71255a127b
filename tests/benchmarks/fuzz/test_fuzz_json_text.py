"""JSON is written as it is meant, also where it is not JSON."""

import json
from typing import Any

import pytest

from benchmarks.fuzz.json_text import Raw, nested, write_json


@pytest.mark.parametrize(
    "value", [None, 1, -0.5, "é\n", {"a": [1, {"b": "\ud800"}], "": []}, [[], {}], 10**30]
)
def test_json_reads_back(value: Any) -> None:
    assert json.loads(write_json(value)) == value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        pytest.param({"n": Raw("1e400")}, '{"n": 1e400}', id="a number that no float holds"),
        pytest.param([float("nan"), float("-inf")], "[NaN, -Infinity]", id="no numbers"),
        pytest.param("\udfff", r'"\udfff"', id="a lone surrogate"),
        pytest.param([nested(3)], "[[[[1]]]]", id="depth"),
        pytest.param(
            nested(2, opening='{"a":', closing="}"), '{"a":{"a":1}}', id="depth of objects"
        ),
    ],
)
def test_text(value: Any, text: str) -> None:
    assert write_json(value) == text


def test_depth_has_no_limit() -> None:
    assert len(write_json({"a": nested(100_000)})) > 200_000
