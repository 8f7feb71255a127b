"""What it costs a first token that somebody else's tokens are made in another engine beside it.

Two bare vLLM servers, with nothing between them: no router, no hand-over, no transfer. One reads
prompts, the other writes answers, in turn, as a split cluster's engines do with one client. On few
cores each finds the caches full of the other's weights and code. What that costs is there before a
split system has done anything at all. `python -m benchmarks.two_engines --help` is the command.
"""

import argparse
import asyncio
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from urllib.parse import SplitResult, urlsplit

from benchmarks.compare import positive
from benchmarks.http_stream import StreamConnection
from benchmarks.load import Load, LoadError, real_time_priority, request_bodies, trace_request
from benchmarks.machine import observe_machine
from benchmarks.measure import LONG_PROMPT, SHORT_PROMPT, wait_until_ready
from benchmarks.report import median_ratio
from benchmarks.systems import (
    SERVED_NAME,
    SystemFailedError,
    adopt_orphans,
    launch_vllm,
    started,
)

_RESULTS = Path(__file__).resolve().parent / "results"
_LOADS = (SHORT_PROMPT, LONG_PROMPT)
_NUM_WARM_UPS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Medians of one round's TTFTs with prompts of one length."""

    one_server_s: float
    two_servers_s: float
    """Of the server that reads prompts, while another has just written an answer."""


class Client:
    """One client's connection to one server."""

    def __init__(self, target: SplitResult, connection: StreamConnection) -> None:
        self._path = f"{target.path.rstrip('/')}/completions"
        self._connection = connection

    @classmethod
    async def open(cls, url: str) -> "Client":
        """Raises OSError if nobody listens at `url`, `http://host:port/v1`."""
        target = urlsplit(url)
        return cls(target, await StreamConnection.open(target))

    async def ttft_s(self, body: bytes) -> float:
        """Sends a request, reads the whole answer. Raises LoadError if it is refused."""
        return trace_request(await self._connection.post(self._path, body)).ttft_s


def bodies(load: Load, rng: random.Random, *, output_tokens: int | None = None) -> list[bytes]:
    """A load's requests, or those with other answers' lengths."""
    asked = Load(
        prompt_tokens=load.prompt_tokens,
        output_tokens=output_tokens or load.output_tokens,
        num_clients=1,
        num_requests=load.num_requests + _NUM_WARM_UPS,
    )
    return request_bodies(SERVED_NAME, asked, rng)


async def take_round(urls: Sequence[str], load: Load, rng: random.Random) -> Round:
    """First one server does all, then one reads the prompts and the other writes as many tokens."""
    # New connections each time: a server closes those that are idle for some seconds.
    reads = await Client.open(urls[0])
    alone_s = [await reads.ttft_s(body) for body in bodies(load, rng)]
    writes = await Client.open(urls[1])
    apart_s = []
    for prompt, answer in zip(bodies(load, rng, output_tokens=1), bodies(load, rng), strict=True):
        apart_s.append(await reads.ttft_s(prompt))
        await writes.ttft_s(answer)
    return Round(
        one_server_s=median(alone_s[_NUM_WARM_UPS:]), two_servers_s=median(apart_s[_NUM_WARM_UPS:])
    )


async def measure(urls: Sequence[str], *, num_rounds: int) -> dict[Load, list[Round]]:
    """All rounds, for prompts of either length."""
    rounds: dict[Load, list[Round]] = {load: [] for load in _LOADS}
    with real_time_priority():
        for number in range(num_rounds):
            rng = random.Random(number)
            for load, taken in rounds.items():
                taken.append(await take_round(urls, load, rng))
                one, two = taken[-1].one_server_s * 1e3, taken[-1].two_servers_s * 1e3
                print(
                    f"round {number + 1} of {num_rounds}, prompts of {load.prompt_tokens}:"
                    f" one server {one:.1f} ms, two servers {two:.1f} ms",
                    flush=True,
                )
    return rounds


def report(rounds: dict[Load, list[Round]]) -> str:
    """The report; Markdown."""
    lines = [
        "| prompt | TTFT p50, one server, ms | two servers, ms | ratio |",
        "|---|---|---|---|",
    ]
    for load, taken in rounds.items():
        one_s = [each.one_server_s for each in taken]
        two_s = [each.two_servers_s for each in taken]
        lines.append(
            f"| {load.prompt_tokens} tokens | {_range(one_s)} | {_range(two_s)}"
            f" | {median_ratio(two_s, one_s):.2f} |"
        )
    table = "\n".join(lines)
    num_rounds = len(next(iter(rounds.values())))
    return f"""\
# Two engines on these cores

Written by `python -m benchmarks.two_engines`; do not edit.

{table}

Medians of {num_rounds} rounds (lowest to highest). Both servers are bare vLLM, and nothing is
handed over: with two, one reads the prompt and samples its first token, then the other answers a
prompt of its own with as many tokens as the one server did, and so on in turn. TTFT is that of the
server that reads. What it is above one server's is what the other engine's work between two prompts
costs: a split system on these cores pays that before it has done anything itself.

## Machine

{observe_machine().markdown()}
"""


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.two_engines",
        description="Measures what a second engine on the same cores costs the first token of one."
        " Takes two minutes; use the machine for nothing else meanwhile.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=positive, default=5, help="turns of either way")
    parser.add_argument("--out", type=Path, default=_RESULTS, help="the folder for the report")
    options = parser.parse_args()
    adopt_orphans()
    try:
        with started(launch_vllm, Path()) as one, started(launch_vllm, Path()) as other:
            for server in (one, other):
                wait_until_ready(server)
            rounds = asyncio.run(measure((one.url, other.url), num_rounds=options.rounds))
    except (SystemFailedError, LoadError, OSError) as failure:
        print(f"no measurement: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: what was started has been stopped", file=sys.stderr)
        return 130
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "two_engines.md").write_text(report(rounds))
    print(f"written to {options.out / 'two_engines.md'}")
    return 0


def _range(values_s: Sequence[float]) -> str:
    middle, low, high = (value * 1e3 for value in (median(values_s), min(values_s), max(values_s)))
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


if __name__ == "__main__":
    sys.exit(main())
