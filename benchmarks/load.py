"""Load on an OpenAI completions endpoint, and what a client sees of it.

Owns the requests (random token prompts, so that no prefix cache answers them), the closed loop of
clients that send them, and the summary. Knows no system: a URL and a model name are all it gets.
`python -m benchmarks.load --help` is the command.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from urllib.parse import urlsplit

from benchmarks.http_stream import Piece, Response, StreamConnection

# Ordinary tokens of the demo model, and of every larger vocabulary.
_PROMPT_TOKEN_IDS = range(10, 760)


class LoadError(RuntimeError):
    """A request was refused, or its answer was not the one asked for: there is no measurement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """`num_clients` clients that send `num_requests` in all, each its next when one is answered."""

    prompt_tokens: int
    output_tokens: int
    num_clients: int
    num_requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTrace:
    """When one request was sent, and when each event that carried tokens arrived."""

    start_s: float
    token_arrivals_s: tuple[float, ...]
    num_output_tokens: int

    @property
    def ttft_s(self) -> float:
        """From the request written to its first token."""
        return self.token_arrivals_s[0] - self.start_s

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """Between events; one token each, except where a server sends several in one."""
        arrivals_s = self.token_arrivals_s
        return tuple(later - earlier for earlier, later in pairwise(arrivals_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSummary:
    """What the clients saw. Metrics that need a second token are None where there was none."""

    num_requests: int
    ttft_s_p50: float
    ttft_s_p90: float
    ttft_s_p99: float
    itl_s_mean: float | None
    gap_s_p50: float | None
    gap_s_p99: float | None
    gap_s_max: float | None
    handover_s_p50: float | None
    tokens_per_s: float
    wall_s: float
    client_cpu_fraction: float
    real_time_client: bool


def percentile(values: Sequence[float], fraction: float) -> float:
    """The value below which `fraction` of the values lie, interpolated linearly.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("a percentile of nothing")
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def parse_events(pieces: Sequence[Piece]) -> Iterator[tuple[float, str]]:
    """The server-sent events of a body, each with the arrival of its last byte."""
    pending = b""
    for piece in pieces:
        *complete, pending = (pending + piece.body).split(b"\n\n")
        for event in complete:
            if event.startswith(b"data: "):
                yield piece.arrival_s, event[len(b"data: ") :].decode()


def trace_request(response: Response) -> RequestTrace:
    """Reads one streamed completion.

    Raises:
        LoadError: it is an error, in its status or inside the stream, or it was cut short.
    """
    if response.status != 200:
        body = b"".join(piece.body for piece in response.pieces)
        raise LoadError(f"HTTP {response.status}: {body.decode(errors='replace')[:500]}")
    token_arrivals_s: list[float] = []
    num_output_tokens: int | None = None
    for arrival_s, text in parse_events(response.pieces):
        if text == "[DONE]":
            break
        event = json.loads(text)
        if "error" in event:
            raise LoadError(f"error in the stream: {text[:500]}")
        if event["choices"]:
            token_arrivals_s.append(arrival_s)
        if event.get("usage"):
            num_output_tokens = int(event["usage"]["completion_tokens"])
    if not token_arrivals_s or num_output_tokens is None:
        raise LoadError("the stream ended without tokens or without usage")
    return RequestTrace(
        start_s=response.start_s,
        token_arrivals_s=tuple(token_arrivals_s),
        num_output_tokens=num_output_tokens,
    )


def summarise(
    traces: Sequence[RequestTrace], *, wall_s: float, client_cpu_s: float, real_time_client: bool
) -> LoadSummary:
    """The numbers of one run. Mean ITL counts tokens, gaps and handover count events."""
    ttfts_s = [trace.ttft_s for trace in traces]
    longer = [trace for trace in traces if trace.num_output_tokens > 1]
    gaps_s = [gap_s for trace in longer for gap_s in trace.gaps_s]
    handovers_s = [trace.gaps_s[0] for trace in longer if trace.gaps_s]
    itls_s = [
        (trace.token_arrivals_s[-1] - trace.token_arrivals_s[0]) / (trace.num_output_tokens - 1)
        for trace in longer
    ]
    return LoadSummary(
        num_requests=len(traces),
        ttft_s_p50=percentile(ttfts_s, 0.5),
        ttft_s_p90=percentile(ttfts_s, 0.9),
        ttft_s_p99=percentile(ttfts_s, 0.99),
        itl_s_mean=fmean(itls_s) if itls_s else None,
        gap_s_p50=percentile(gaps_s, 0.5) if gaps_s else None,
        gap_s_p99=percentile(gaps_s, 0.99) if gaps_s else None,
        gap_s_max=max(gaps_s, default=None),
        handover_s_p50=percentile(handovers_s, 0.5) if handovers_s else None,
        tokens_per_s=sum(trace.num_output_tokens for trace in traces) / wall_s,
        wall_s=wall_s,
        client_cpu_fraction=client_cpu_s / wall_s,
        real_time_client=real_time_client,
    )


def request_bodies(model: str, load: Load, rng: random.Random) -> list[bytes]:
    """The requests of a load, made before the clock starts."""
    return [
        json.dumps(
            {
                "model": model,
                "prompt": rng.choices(_PROMPT_TOKEN_IDS, k=load.prompt_tokens),
                "max_tokens": load.output_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        for _ in range(load.num_requests)
    ]


@contextmanager
def real_time_priority() -> Iterator[bool]:
    """Runs this thread ahead of ordinary ones; yields False where the system does not allow it.

    Clients usually have a machine of their own. Here they share cores with engines that spin, and
    would otherwise wait up to 200 ms for their turn to read a token that arrived long ago.
    """
    scheduler, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except PermissionError:
        yield False
        return
    try:
        yield True
    finally:
        os.sched_setscheduler(0, scheduler, parameters)


async def run_load(url: str, model: str, load: Load, *, seed: int) -> LoadSummary:
    """Puts `load` on the endpoint (`http://host:port/v1`) and measures it.

    Raises:
        LoadError: a request failed.
        OSError: the server is not there, or went away.
    """
    target = urlsplit(url)
    path = f"{target.path.rstrip('/')}/completions"
    waiting = request_bodies(model, load, random.Random(seed))
    connections = [await StreamConnection.open(target) for _ in range(load.num_clients)]
    responses: list[Response] = []

    async def client(connection: StreamConnection) -> None:
        while waiting:
            responses.append(await connection.post(path, waiting.pop()))

    cpu_start_s, start_s = time.process_time(), time.perf_counter()
    try:
        with real_time_priority() as real_time_client:
            async with asyncio.TaskGroup() as clients:
                for connection in connections:
                    clients.create_task(client(connection))
        wall_s = time.perf_counter() - start_s
        client_cpu_s = time.process_time() - cpu_start_s
    except* OSError as failures:
        raise failures.exceptions[0] from None
    finally:
        for connection in connections:
            connection.close()
    traces = [trace_request(response) for response in responses]
    for trace in traces:
        if trace.num_output_tokens != load.output_tokens:
            raise LoadError(f"{trace.num_output_tokens} tokens came, not {load.output_tokens}")
    return summarise(
        traces, wall_s=wall_s, client_cpu_s=client_cpu_s, real_time_client=real_time_client
    )


def format_summary(summary: LoadSummary) -> str:
    """The summary for a terminal, in milliseconds."""

    def ms(value_s: float | None) -> str:
        return "-" if value_s is None else f"{value_s * 1e3:.2f}"

    return "\n".join(
        (
            f"requests       {summary.num_requests} in {summary.wall_s:.2f} s",
            f"TTFT ms        p50 {ms(summary.ttft_s_p50)}   p90 {ms(summary.ttft_s_p90)}"
            f"   p99 {ms(summary.ttft_s_p99)}",
            f"ITL ms         mean {ms(summary.itl_s_mean)}   (between events: p50"
            f" {ms(summary.gap_s_p50)}   p99 {ms(summary.gap_s_p99)})",
            f"handover ms    p50 {ms(summary.handover_s_p50)}   (first token to second)",
            f"throughput     {summary.tokens_per_s:.0f} output tokens/s",
            f"client         {summary.client_cpu_fraction:.1%} of a core,"
            f" {'real-time' if summary.real_time_client else 'ordinary'} priority",
        )
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load",
        description="Puts load on an OpenAI completions endpoint and prints what clients see.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="the API's base")
    parser.add_argument("--model", default="demo", help="the served model's name")
    parser.add_argument("--prompt-tokens", type=int, default=200, help="tokens a prompt")
    parser.add_argument("--output-tokens", type=int, default=32, help="tokens an answer")
    parser.add_argument("--concurrency", type=int, default=8, help="clients at once")
    parser.add_argument("--requests", type=int, default=64, help="requests in all")
    parser.add_argument("--warmup", type=int, default=8, help="requests before the clock starts")
    parser.add_argument("--seed", type=int, help="the prompts' seed; a new one each run if not set")
    options = parser.parse_args()
    load = Load(
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
        num_clients=options.concurrency,
        num_requests=options.requests,
    )
    seeds = random.Random(options.seed)
    try:
        if options.warmup:
            warmup = Load(
                prompt_tokens=load.prompt_tokens,
                output_tokens=load.output_tokens,
                num_clients=min(load.num_clients, options.warmup),
                num_requests=options.warmup,
            )
            asyncio.run(run_load(options.url, options.model, warmup, seed=seeds.getrandbits(32)))
        summary = asyncio.run(
            run_load(options.url, options.model, load, seed=seeds.getrandbits(32))
        )
    except (LoadError, OSError) as error:
        print(f"no measurement: {error}", file=sys.stderr)
        return 1
    print(format_summary(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
