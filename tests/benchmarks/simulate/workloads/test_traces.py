"""Traces of both formats, what is wrong with a file, and workloads made larger."""

from pathlib import Path

import pytest

from benchmarks.simulate.model.requests import Arrival
from benchmarks.simulate.workloads.traces import (
    JITTER_S,
    SPREAD_S,
    TraceError,
    multiply,
    read_trace,
)

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


def test_multiplied_traces_are_shifted_copies() -> None:
    trace = [Arrival(2.0 * number, 100 + number, 7, (number,)) for number in range(500)]
    larger = multiply(trace, 2.5, seed=1)
    assert len(larger) == pytest.approx(1250, abs=60)
    assert larger == sorted(larger, key=lambda each: each.arrival_s)
    end_s = trace[-1].arrival_s + JITTER_S
    shifts: dict[int, list[float]] = {}
    for each in larger:
        late_s = (each.arrival_s - 2.0 * (each.prompt_tokens - 100)) % end_s
        shifts.setdefault(each.block_ids[0] >> 40, []).append(late_s)
    assert shifts.keys() == {0, 1, 2}
    for copy, lates_s in shifts.items():
        assert max(lates_s) - min(lates_s) <= JITTER_S, "a copy moves as a whole"
        assert max(lates_s) <= JITTER_S + (SPREAD_S if copy else 0.0)
    # Copies are other users': they share no blocks.
    assert len({each.block_ids for each in larger}) == len(larger)
    assert multiply(trace, 2.5, seed=1) == larger
