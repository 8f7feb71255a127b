"""Public traces as workloads: read, jittered where timestamps are coarse, and multiplied.

Two formats: CSV with the columns TIMESTAMP, ContextTokens, GeneratedTokens (Azure), and JSON lines
with timestamp (ms), input_length, output_length and perhaps hash_ids (Mooncake).
"""

import csv
import json
import math
import random
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from benchmarks.simulate.model.requests import Arrival

JITTER_S = 3.0
"""Over which each request is spread: the granularity of Mooncake's timestamps."""

SPREAD_S = 120.0
"""Over which whole copies of a trace are shifted: other users share
the minutes, not the seconds."""


class TraceError(ValueError):
    """A trace that cannot be read; the text names file and line."""


def read_trace(path: Path) -> list[Arrival]:
    """A trace's requests in order of arrival, the first at 0 s.

    Raises:
        TraceError: the file is in neither format, or empty.
        OSError: it cannot be read.
    """
    read = _read_csv if path.suffix.lower() == ".csv" else _read_jsonl
    arrivals = sorted(read(path), key=lambda each: each.arrival_s)
    if not arrivals:
        raise TraceError(f"{path}: no requests")
    start_s = arrivals[0].arrival_s
    return [
        Arrival(each.arrival_s - start_s, each.prompt_tokens, each.output_tokens, each.block_ids)
        for each in arrivals
    ]


def multiply(trace: Sequence[Arrival], factor: float, *, seed: int) -> list[Arrival]:
    """`factor` times the requests: superposed copies of the trace, each shifted as a whole.

    Each copy is late by up to `SPREAD_S`, what that moves beyond the end coming first, so that the
    bursts of one copy stay as they were and do not fall together with those of all others. The
    last copy is thinned to the fraction that is left. Copies share no prompt blocks: they stand for
    other users.
    """
    rng = random.Random(seed)
    end_s = trace[-1].arrival_s + JITTER_S
    arrivals = []
    for copy in range(math.ceil(factor)):
        shift_s = rng.random() * min(SPREAD_S, end_s) if copy else 0.0
        share = min(1.0, factor - copy)
        arrivals += [
            Arrival(
                (each.arrival_s + shift_s + rng.random() * JITTER_S) % end_s,
                each.prompt_tokens,
                each.output_tokens,
                tuple((copy << 40) + block for block in each.block_ids),
            )
            for each in trace
            if share == 1.0 or rng.random() < share
        ]
    return sorted(arrivals, key=lambda each: each.arrival_s)


def _read_csv(path: Path) -> Iterator[Arrival]:
    with path.open(newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines), 2):
            try:
                yield Arrival(
                    datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp(),
                    max(int(row["ContextTokens"]), 1),
                    max(int(row["GeneratedTokens"]), 1),
                )
            except (KeyError, TypeError, ValueError) as error:
                raise TraceError(f"{path}:{number}: {error!r}") from error


def _read_jsonl(path: Path) -> Iterator[Arrival]:
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                yield Arrival(
                    float(row["timestamp"]) / 1e3,
                    max(int(row["input_length"]), 1),
                    max(int(row["output_length"]), 1),
                    tuple(int(block) for block in row.get("hash_ids", ())),
                )
            except (KeyError, TypeError, ValueError) as error:
                raise TraceError(f"{path}:{number}: {error!r}") from error
