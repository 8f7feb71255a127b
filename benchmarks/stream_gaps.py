"""What the streams of others notice of requests whose work takes long: grammars, patterns, schemas
and templates. `python -m benchmarks.stream_gaps --help` is the command.

Owns the order of things: rounds without and with them, in turn, on one cluster.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from threading import Event
from urllib.parse import urlsplit

from benchmarks.fuzz.deadly import deadly_bodies
from benchmarks.load import Load, LoadError, run_load
from benchmarks.measure import wait_until_ready
from benchmarks.systems import (
    RunningSystem,
    SystemFailedError,
    adopt_orphans,
    launch_pdserve,
    started,
)

_CONFIG = Path(__file__).resolve().parent.parent / "cluster" / "configs" / "tiny.yaml"
_STREAMS = Load(prompt_tokens=60, output_tokens=400, num_clients=4, num_requests=16)
_ANSWER_TIMEOUT_S = 300.0
_EXAMPLES = """\
examples:
  python -m benchmarks.stream_gaps              five rounds
  python -m benchmarks.stream_gaps --rounds 9   more, on a machine that does other things as well
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """The longest time between two tokens of any stream, without and with long work of others."""

    without_s: float
    with_s: float
    num_sent: int


class Others:
    """Clients that send requests of long work, each its next when one is answered."""

    def __init__(self, url: str, bodies: Sequence[tuple[str, bytes]], *, num_clients: int) -> None:
        self._address = urlsplit(url).netloc
        self._bodies = bodies
        self._num_clients = num_clients
        self.num_sent = 0

    @contextmanager
    def sending(self) -> Iterator[None]:
        """They send until the block ends.

        Raises:
            LoadError: none was answered, or the cluster went away.
        """
        over, before = Event(), self.num_sent
        with ThreadPoolExecutor(self._num_clients) as clients:
            futures: list[Future[None]] = [
                clients.submit(self._send, over) for _ in range(self._num_clients)
            ]
            try:
                yield
            finally:
                over.set()
        for future in futures:
            future.result()
        if self.num_sent == before:
            raise LoadError("none of the requests of long work was answered")

    def _send(self, over: Event) -> None:
        while not over.is_set():
            path, body = self._bodies[self.num_sent % len(self._bodies)]
            connection = HTTPConnection(self._address, timeout=_ANSWER_TIMEOUT_S)
            try:
                connection.request("POST", path, body, {"Content-Type": "application/json"})
                connection.getresponse().read()
            except (OSError, HTTPException) as error:
                raise LoadError(f"a request of long work: {error!r}") from error
            finally:
                connection.close()
            self.num_sent += 1


def _rounds(system: RunningSystem, *, num_rounds: int, num_clients: int) -> list[Round]:
    wait_until_ready(system)
    bodies = deadly_bodies()
    random.Random(0).shuffle(bodies)  # else the first kinds would be all that is sent
    others = Others(system.url, bodies, num_clients=num_clients)
    _worst_gap_s(system.url, seed=-1)
    rounds = []
    for number in range(num_rounds):
        without_s = _worst_gap_s(system.url, seed=2 * number)
        before = others.num_sent
        with others.sending():
            with_s = _worst_gap_s(system.url, seed=2 * number + 1)
        each = Round(without_s=without_s, with_s=with_s, num_sent=others.num_sent - before)
        print(
            f"round {number + 1}: {each.without_s * 1e3:.0f} ms without,"
            f" {each.with_s * 1e3:.0f} ms beside {each.num_sent} requests",
            flush=True,
        )
        rounds.append(each)
    return rounds


def _worst_gap_s(url: str, *, seed: int) -> float:
    summary = asyncio.run(run_load(url, "demo", _STREAMS, seed=seed))
    if summary.gap_s_max is None:
        raise LoadError("no stream has two tokens")
    return summary.gap_s_max


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stream_gaps",
        description="The longest time between two tokens of four streams, with and without clients"
        " that send grammars, patterns, schemas and templates of long work. The last line is JSON.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5, help="of each; default 5")
    parser.add_argument("--clients", type=int, default=2, help="that send long work; default 2")
    parser.add_argument("--config", type=Path, default=_CONFIG, help="default tiny.yaml")
    options = parser.parse_args()
    adopt_orphans()
    try:
        with started(launch_pdserve, options.config) as system:
            rounds = _rounds(system, num_rounds=options.rounds, num_clients=options.clients)
    except (LoadError, SystemFailedError, OSError) as error:
        print(f"no measurement: {error}", file=sys.stderr)
        return 1
    without_s = max(each.without_s for each in rounds)
    with_s = max(each.with_s for each in rounds)
    numbers = {
        "worst_without_ms": round(without_s * 1e3, 1),
        "worst_with_ms": round(with_s * 1e3, 1),
        "ratio": round(with_s / without_s, 2),
        "median_ratio": round(
            statistics.median(each.with_s / each.without_s for each in rounds), 2
        ),
        "requests": sum(each.num_sent for each in rounds),
    }
    print(json.dumps(numbers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
