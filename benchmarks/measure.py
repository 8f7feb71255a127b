"""What is measured on one running system, in which order and under which load.

Owns the loads and the metrics' names. Never starts or stops anything.
"""

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.load import Load, LoadError, LoadSummary, run_load
from benchmarks.systems import SERVED_NAME, RunningSystem, SystemFailedError, used_cpu_s

READY_TIMEOUT_S = 300.0
_SETTLE_S = 5.0
_IDLE_S = 5.0

_PROBE = Load(prompt_tokens=8, output_tokens=2, num_clients=1, num_requests=1)
_WARM_UP = (
    Load(prompt_tokens=200, output_tokens=32, num_clients=8, num_requests=64),
    Load(prompt_tokens=500, output_tokens=8, num_clients=1, num_requests=8),
    Load(prompt_tokens=20, output_tokens=64, num_clients=1, num_requests=8),
)
SHORT_PROMPT = Load(prompt_tokens=20, output_tokens=64, num_clients=1, num_requests=40)
LONG_PROMPT = Load(prompt_tokens=500, output_tokens=8, num_clients=1, num_requests=40)
CLIENTS_8 = Load(prompt_tokens=200, output_tokens=32, num_clients=8, num_requests=160)
CLIENTS_32 = Load(prompt_tokens=200, output_tokens=32, num_clients=32, num_requests=320)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """One system in one round. `_20` and `_500` are prompt tokens, `_c8` and `_c32` clients."""

    ttft_s_p50_20: float
    ttft_s_p50_500: float
    itl_s_mean: float
    handover_s_p50: float
    tokens_per_s_c8: float
    ttft_s_p50_c8: float
    ttft_s_p90_c8: float
    tokens_per_s_c32: float
    ttft_s_p50_c32: float
    ttft_s_p90_c32: float
    idle_cores: float
    client_cores_c32: float


def wait_until_ready(system: RunningSystem) -> float:
    """Waits until completions are answered; returns the seconds to the first answer.

    The first answer is not enough: HAProxy, for one, is restarted when the last replica is up, and
    that closes connections. All must be answered for `_SETTLE_S`.

    Raises:
        SystemFailedError: the system ended, or was not ready in `READY_TIMEOUT_S`.
    """
    start_s = time.monotonic()
    first_answer_s: float | None = None
    reason = ""
    while (now_s := time.monotonic()) - start_s < READY_TIMEOUT_S:
        system.check_alive()
        if first_answer_s is not None and now_s - first_answer_s >= _SETTLE_S:
            return first_answer_s - start_s
        try:
            asyncio.run(_probe(system.url))
        except (LoadError, OSError) as error:
            first_answer_s, reason = None, str(error)
        else:
            first_answer_s = first_answer_s or time.monotonic()
        time.sleep(0.5)
    raise SystemFailedError(f"no answer after {READY_TIMEOUT_S:.0f} s: {reason}")


def measure(system: RunningSystem, *, seed: int, report: Callable[[str], None]) -> Metrics:
    """Warms the system up and puts every load on it; `report` gets a line for each.

    Raises:
        LoadError: a request failed.
    """
    seeds = random.Random(seed)

    def run(load: Load) -> LoadSummary:
        return asyncio.run(run_load(system.url, SERVED_NAME, load, seed=seeds.getrandbits(32)))

    for load in _WARM_UP:
        run(load)
    short = run(SHORT_PROMPT)
    itl_s, handover_s = _required(short.itl_s_mean), _required(short.handover_s_p50)
    report(
        f"1 client, 20 tokens: TTFT p50 {short.ttft_s_p50 * 1e3:.1f} ms,"
        f" ITL mean {itl_s * 1e3:.2f} ms, handover p50 {handover_s * 1e3:.1f} ms"
    )
    long = run(LONG_PROMPT)
    report(f"1 client, 500 tokens: TTFT p50 {long.ttft_s_p50 * 1e3:.1f} ms")
    clients_8 = run(CLIENTS_8)
    report(_throughput_line(CLIENTS_8, clients_8))
    clients_32 = run(CLIENTS_32)
    report(_throughput_line(CLIENTS_32, clients_32))
    idle_cores = _observe_idle_cores()
    report(f"idle: {idle_cores:.1%} of a core")
    return Metrics(
        ttft_s_p50_20=short.ttft_s_p50,
        ttft_s_p50_500=long.ttft_s_p50,
        itl_s_mean=itl_s,
        handover_s_p50=handover_s,
        tokens_per_s_c8=clients_8.tokens_per_s,
        ttft_s_p50_c8=clients_8.ttft_s_p50,
        ttft_s_p90_c8=clients_8.ttft_s_p90,
        tokens_per_s_c32=clients_32.tokens_per_s,
        ttft_s_p50_c32=clients_32.ttft_s_p50,
        ttft_s_p90_c32=clients_32.ttft_s_p90,
        idle_cores=idle_cores,
        client_cores_c32=clients_32.client_cpu_fraction,
    )


async def _probe(url: str) -> None:
    async with asyncio.timeout(30):
        await run_load(url, SERVED_NAME, _PROBE, seed=time.monotonic_ns())


def _required(value: float | None) -> float:
    if value is None:
        raise LoadError("every answer came in one piece: no time between tokens was seen")
    return value


def _throughput_line(load: Load, summary: LoadSummary) -> str:
    return (
        f"{load.num_clients} clients: {summary.tokens_per_s:.0f} tokens/s,"
        f" TTFT p50 {summary.ttft_s_p50 * 1e3:.0f} ms, p90 {summary.ttft_s_p90 * 1e3:.0f} ms"
    )


def _observe_idle_cores() -> float:
    # vLLM's queues go on spinning for a second after the last message: that is not yet idle.
    time.sleep(2.0)
    cpu_start_s, start_s = used_cpu_s(), time.monotonic()
    time.sleep(_IDLE_S)
    return (used_cpu_s() - cpu_start_s) / (time.monotonic() - start_s)
