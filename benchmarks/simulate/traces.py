"""Public traces as workloads: read, jittered where timestamps are coarse, and multiplied.

Two formats: CSV with the columns TIMESTAMP, ContextTokens, GeneratedTokens (Azure), and JSON lines
with timestamp (ms), input_length, output_length and perhaps hash_ids (Mooncake).
"""

import csv
import json
import random
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from benchmarks.simulate.requests import Arrival

JITTER_S = 3.0
"""Over which a request's copies are spread, and the granularity of Mooncake's timestamps."""


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
    """`factor` times the requests, at the same times within `JITTER_S`, with the same shapes.

    Copies share no prompt blocks with their original: they stand for other users.
    """
    rng = random.Random(seed)
    arrivals = []
    for each in trace:
        copies = int(factor) + (rng.random() < factor - int(factor))
        for copy in range(copies):
            arrivals.append(
                Arrival(
                    each.arrival_s + rng.random() * JITTER_S,
                    each.prompt_tokens,
                    each.output_tokens,
                    tuple((copy << 40) + block for block in each.block_ids),
                )
            )
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
