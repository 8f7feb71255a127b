"""Traces of both formats, what is wrong with a file, and workloads made larger."""

from pathlib import Path

import pytest

from benchmarks.simulate.requests import Arrival
from benchmarks.simulate.traces import JITTER_S, TraceError, multiply, read_trace

CSV = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:17:03.9799600,4808,0
"""
JSONL = """{"timestamp": 3000, "input_length": 10, "output_length": 5, "hash_ids": [0, 1]}

{"timestamp": 27482, "input_length": 7322, "output_length": 490}
"""


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_csv_is_sorted_and_starts_at_zero(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path / "trace.csv", CSV))
    assert [(each.prompt_tokens, each.output_tokens) for each in trace] == [(4808, 1), (3180, 8)]
    assert [each.arrival_s for each in trace] == pytest.approx([0.0, 0.052], abs=1e-6)


def test_json_lines_keep_their_blocks(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path / "trace.jsonl", JSONL))
    assert trace[0] == Arrival(0.0, 10, 5, (0, 1))
    assert trace[1].arrival_s == pytest.approx(24.482)


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("trace.csv", "TIMESTAMP,ContextTokens\n2023-11-16 18:17:04,3\n", ":2:"),
        ("trace.csv", CSV + "yesterday,1,2\n", ":4:"),
        ("trace.jsonl", JSONL + "{}\n", ":4:"),
        ("trace.jsonl", "", "no requests"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, text: str, place: str) -> None:
    path = written(tmp_path / name, text)
    with pytest.raises(TraceError, match=place):
        read_trace(path)


def test_multiplied_traces_keep_shapes_and_times() -> None:
    trace = [Arrival(float(second), 100 + second, 7, (second,)) for second in range(200)]
    larger = multiply(trace, 2.5, seed=1)
    assert len(larger) == pytest.approx(500, abs=40)
    assert larger == sorted(larger, key=lambda each: each.arrival_s)
    for each in larger:
        delay_s = each.arrival_s - (each.prompt_tokens - 100)
        assert 0 <= delay_s <= JITTER_S
    # Copies are other users': they share no blocks.
    assert len({each.block_ids for each in larger}) == len(larger)
    assert multiply(trace, 2.5, seed=1) == larger
