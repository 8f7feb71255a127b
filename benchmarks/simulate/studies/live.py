"""Measures the live two-core cluster: its engines' costs, single requests, three open-loop loads.

Owns the order of the measurements and the open loop. What is made of them is `live_record`'s.
"""

import asyncio
import random
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.http_stream import Response, StreamConnection
from benchmarks.load import (
    Load,
    LoadError,
    RequestTrace,
    real_time_priority,
    request_bodies,
    run_load,
    trace_request,
)
from benchmarks.machine import observe_machine
from benchmarks.measure import wait_until_ready
from benchmarks.simulate.model.requests import Arrival
from benchmarks.simulate.studies.live_record import (
    Beside,
    LiveLoad,
    LiveRecord,
    LiveRequest,
    Single,
)
from benchmarks.systems import (
    SERVED_NAME,
    RunningSystem,
    SystemFailedError,
    adopt_orphans,
    launch_pdserve,
    started,
)
from router.costs import DecodeCost, PrefillCost

CONFIG = Path(__file__).parents[2] / "configs" / "simulate_live.yaml"
SHARES = (0.15, 0.3, 0.45)
"""Of the time of the prefill engine, for each load; the cores are shared by four processes."""
DURATION_S = 60.0
PROMPT_TOKENS = (64, 1024)
"""Uniform, of the loads."""
OUTPUT_TOKENS = 24
_SINGLES = (64, 256, 512, 1024)
_PER_SINGLE = 24
_CLIENTS = (1, 2, 4, 8)
_PER_CLIENTS = 48
_ROUNDS = 2
_ANSWERS_AT_ONCE = (1, 2, 4)
_ANSWER = Arrival(0.0, 64, 800)
_BESIDE_PROMPT_TOKENS = 1024
_BESIDE_AT_S = tuple(0.2 + 0.15 * number for number in range(6))
"""Apart enough that each has been read when the next comes, and the answers not ended."""
_PER_BESIDE = 6
_METRICS_TIMEOUT_S = 10.0

Say = Callable[[str], None]


def measure_live(*, config: Path, duration_s: float, seed: int, say: Say) -> LiveRecord:
    """Starts the cluster, measures it for a few minutes and stops it.

    Raises:
        SystemFailedError: it did not start, ended, or failed a request.
    """
    adopt_orphans()
    with started(launch_pdserve, config) as system:
        try:
            say(f"ready after {wait_until_ready(system):.0f} s")
            return _measure(system, duration_s=duration_s, rng=random.Random(seed), say=say)
        except (LoadError, OSError) as error:
            system.check_alive()
            raise SystemFailedError(f"{error}; the end of its log:\n{system.log_tail()}") from error


def read_costs(metrics: str) -> tuple[PrefillCost, DecodeCost]:
    """The cost of reading prompts in the prefill pool and of steps in the decode pool.

    Args:
        metrics: a router's Prometheus text.

    Raises:
        LoadError: it lacks one.
    """
    costs = {
        (sample.labels["pool"], sample.labels["term"]): sample.value
        for family in text_string_to_metric_families(metrics)
        if family.name == "pdserve_cost_seconds"
        for sample in family.samples
    }
    try:
        return (
            PrefillCost(
                base_s=costs["prefill", "prompt"],
                per_token_s=costs["prefill", "prompt_token"],
                per_token_squared_s=costs["prefill", "prompt_token_squared"],
            ),
            DecodeCost(
                base_s=costs["decode", "step"],
                per_request_s=costs["decode", "request"],
                per_context_token_s=costs["decode", "context_token"],
            ),
        )
    except KeyError as missing:
        raise LoadError(f"the router's metrics have no cost of {missing}") from None


def draw_arrivals(rate: float, duration_s: float, rng: random.Random) -> list[Arrival]:
    """Poisson arrivals of the loads' lengths; at least one."""
    arrivals: list[Arrival] = []
    now_s = rng.expovariate(rate)
    while not arrivals or now_s < duration_s:
        arrivals.append(Arrival(now_s, rng.randint(*PROMPT_TOKENS), OUTPUT_TOKENS))
        now_s += rng.expovariate(rate)
    return arrivals


def summarise_single(prompt_tokens: int, traces: Sequence[RequestTrace]) -> Single:
    """Medians of requests of one shape, of which each got at least three tokens one by one."""
    return Single(
        prompt_tokens=prompt_tokens,
        output_tokens=traces[0].num_output_tokens,
        ttft_s=median(trace.ttft_s for trace in traces),
        handover_s=median(trace.gaps_s[0] for trace in traces),
        itl_s=median(gap_s for trace in traces for gap_s in trace.gaps_s[1:]),
    )


def summarise_beside(
    alone: Sequence[Sequence[RequestTrace]],
    beside: Sequence[tuple[Sequence[RequestTrace], Sequence[RequestTrace]]],
) -> Beside:
    """Medians of runs of long answers alone, and of runs of answers and the prompts beside them.

    Some tokens come together: what answers take while a prompt is being read follows from the
    number of their tokens and how long prompts were read, not from single gaps.
    """
    itl_s = median(fmean(map(_itl_s, answers)) for answers in alone)
    return Beside(
        num_answers=len(alone[0]),
        context_tokens=_ANSWER.prompt_tokens + _ANSWER.output_tokens / 2,
        itl_s=itl_s,
        reading_itl_s=median(
            fmean(_reading_itl_s(each, prompts, itl_s) for each in answers)
            for answers, prompts in beside
        ),
        prompt_tokens=_BESIDE_PROMPT_TOKENS,
        ttft_s=median(trace.ttft_s for _, prompts in beside for trace in prompts),
    )


def summarise_load(
    rate: float, arrivals: Sequence[Arrival], traces: Sequence[RequestTrace], *, start_s: float
) -> LiveLoad:
    """A load as it went. Requests arrive when they were written, not when it was their turn."""
    requests = [
        LiveRequest(
            arrival_s=trace.start_s - start_s,
            prompt_tokens=arrival.prompt_tokens,
            output_tokens=trace.num_output_tokens,
            ttft_s=trace.ttft_s,
            itl_s=_itl_s(trace),
        )
        for arrival, trace in zip(arrivals, traces, strict=True)
    ]
    return LiveLoad(rate=rate, requests=tuple(sorted(requests, key=lambda each: each.arrival_s)))


async def run_open_loop(
    url: str, arrivals: Sequence[Arrival], rng: random.Random
) -> tuple[list[RequestTrace], float]:
    """Sends each request at its time, whatever the others are at.

    Returns their traces, in this order, and when the load began on the traces' clock.

    Raises:
        LoadError: a request failed, or its answer is not as long as it was to be.
        OSError: the server is not there, or went away.
    """
    target = urlsplit(url)
    path = f"{target.path.rstrip('/')}/completions"
    bodies = [request_bodies(SERVED_NAME, _load_of(each), rng)[0] for each in arrivals]
    idle: list[StreamConnection] = [await StreamConnection.open(target)]
    responses: dict[int, Response] = {}

    async def send(number: int) -> None:
        connection = idle.pop() if idle else await StreamConnection.open(target)
        responses[number] = await connection.post(path, bodies[number])
        idle.append(connection)

    start_s = time.perf_counter()
    try:
        with real_time_priority():
            async with asyncio.TaskGroup() as requests:
                for number, arrival in enumerate(arrivals):
                    await asyncio.sleep(start_s + arrival.arrival_s - time.perf_counter())
                    requests.create_task(send(number))
    except* OSError as failures:
        raise failures.exceptions[0] from None
    finally:
        for connection in idle:
            connection.close()
    traces = [trace_request(responses[number]) for number in range(len(arrivals))]
    for arrival, trace in zip(arrivals, traces, strict=True):
        if trace.num_output_tokens != arrival.output_tokens:
            raise LoadError(f"{trace.num_output_tokens} tokens came, not {arrival.output_tokens}")
    return traces, start_s


def _measure(
    system: RunningSystem, *, duration_s: float, rng: random.Random, say: Say
) -> LiveRecord:
    _mix(system, rng)
    singles = []
    for num_tokens in _SINGLES:
        arrivals = [Arrival(0.0, num_tokens, OUTPUT_TOKENS)]
        traces = [
            asyncio.run(run_open_loop(system.url, arrivals, rng))[0][0] for _ in range(_PER_SINGLE)
        ]
        single = summarise_single(num_tokens, traces)
        singles.append(single)
        say(
            f"alone, {num_tokens} tokens: TTFT {1e3 * single.ttft_s:.1f} ms, handover"
            f" {1e3 * single.handover_s:.1f} ms, ITL {1e3 * single.itl_s:.2f} ms"
        )
    besides = [_measure_beside(system, num_answers, rng) for num_answers in _ANSWERS_AT_ONCE]
    for each in besides:
        say(
            f"{each.num_answers} answers at once: ITL {1e3 * each.itl_s:.2f} ms, while a prompt is"
            f" read {1e3 * each.reading_itl_s:.2f} ms; TTFT beside them {1e3 * each.ttft_s:.1f} ms"
        )
    # Batches of all sizes last: the router's fit forgets what was long ago.
    for _ in range(_ROUNDS):
        _mix(system, rng)
    prefill, decode = read_costs(_metrics(system.url))
    say(f"fitted: {prefill}, {decode}")
    loads = []
    for share in SHARES:
        rate = share / fmean(
            prefill.seconds(num_uncached=each, num_tokens=each) for each in range(*PROMPT_TOKENS)
        )
        arrivals = draw_arrivals(rate, duration_s, rng)
        traces, start_s = asyncio.run(run_open_loop(system.url, arrivals, rng))
        loads.append(summarise_load(rate, arrivals, traces, start_s=start_s))
        ttft_s = fmean(trace.ttft_s for trace in traces)
        say(f"{rate:.1f} requests/s, {len(arrivals)} requests: TTFT {1e3 * ttft_s:.1f} ms")
    return LiveRecord(
        machine=observe_machine().markdown(),
        prefill=prefill,
        decode=decode,
        singles=tuple(singles),
        besides=tuple(besides),
        loads=tuple(loads),
    )


def _measure_beside(system: RunningSystem, num_answers: int, rng: random.Random) -> Beside:
    answers = [_ANSWER] * num_answers
    prompts = [Arrival(at_s, _BESIDE_PROMPT_TOKENS, 1) for at_s in _BESIDE_AT_S]
    alone, beside = [], []
    for _ in range(_PER_BESIDE):
        alone.append(asyncio.run(run_open_loop(system.url, answers, rng))[0])
        traces = asyncio.run(run_open_loop(system.url, [*answers, *prompts], rng))[0]
        beside.append((traces[:num_answers], traces[num_answers:]))
    return summarise_beside(alone, beside)


def _itl_s(trace: RequestTrace) -> float:
    """The mean over its tokens."""
    return sum(trace.gaps_s) / (trace.num_output_tokens - 1)


def _reading_itl_s(
    answer: RequestTrace, prompts: Sequence[RequestTrace], otherwise_s: float
) -> float:
    """What each token took while one of the prompts was being read."""
    whole_s = sum(answer.gaps_s)
    reading_s = sum(prompt.ttft_s for prompt in prompts)
    num_otherwise = (whole_s - reading_s) / otherwise_s
    return reading_s / max(answer.num_output_tokens - 1 - num_otherwise, 1)


def _mix(system: RunningSystem, rng: random.Random) -> None:
    """Closed loops of all lengths and several numbers of clients."""
    for num_clients in _CLIENTS:
        for num_tokens in _SINGLES:
            load = Load(
                prompt_tokens=num_tokens,
                output_tokens=OUTPUT_TOKENS,
                num_clients=num_clients,
                num_requests=_PER_CLIENTS,
            )
            asyncio.run(run_load(system.url, SERVED_NAME, load, seed=rng.getrandbits(32)))


def _load_of(arrival: Arrival) -> Load:
    return Load(
        prompt_tokens=arrival.prompt_tokens,
        output_tokens=arrival.output_tokens,
        num_clients=1,
        num_requests=1,
    )


def _metrics(url: str) -> str:
    target = urlsplit(url)._replace(path="/metrics").geturl()
    with urllib.request.urlopen(target, timeout=_METRICS_TIMEOUT_S) as answer:
        return str(answer.read(), "utf-8")
