"""How long requests pause when an engine of theirs ends, against what that takes at least.

At least: the time in which the engines that are left compute as many tokens, with nothing else to
do. It is measured right after, while the pool still lacks the engine that has ended. Owns the
requests.
"""

import asyncio
import itertools
import secrets
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.chaos_cases import Case, token_prompt
from benchmarks.chaos_client import Client, Outcome
from benchmarks.chaos_processes import engine_below, signal_process
from benchmarks.load import percentile
from benchmarks.serve_api import ServeApi
from kvtransfer.phase import Phase

NUM_REQUESTS = 32
KILL_AFTER = 0.4
"""Of the time that the same requests take undisturbed."""
MIN_PAUSE_RATIO = 5.0
"""How many times longer than a stream's median gap a pause is."""
IN_FLIGHT_S = 0.25
"""What an engine made before its end may reach the client so much later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failover:
    """One engine's end under load."""

    pool: Phase
    pauses_s: tuple[float, ...]
    """From the engine's end to the next token, of each request that lost it."""
    least_s: float
    """What computing their tokens again has taken, all at once."""
    num_failed: int

    @property
    def p99_s(self) -> float | None:
        return percentile(self.pauses_s, 0.99) if self.pauses_s else None


def streams() -> list[Case]:
    """Long answers: what ends is a decode engine."""
    return [_case(f"failover-{index}", 60 + index, 400) for index in range(NUM_REQUESTS)]


def prompts() -> list[Case]:
    """Long prompts: what ends is a prefill engine."""
    return [_case(f"failover-{index}", 500 + index, 2) for index in range(NUM_REQUESTS)]


async def measure_failover(client: Client, serve_api: ServeApi, pool: Phase) -> Failover:
    """Ends one engine of a pool of an idle, whole cluster under requests of that pool's kind."""
    cases = streams() if pool == "decode" else prompts()
    undisturbed_s = await _timed(client, cases)
    asked = [asyncio.create_task(_ask(client, case)) for case in cases]
    await asyncio.sleep(KILL_AFTER * undisturbed_s)
    killed_s = await _kill_engine(serve_api, pool)
    outcomes = await asyncio.gather(*asked)
    lost = {
        case.name: pause_s
        for case, outcome in zip(cases, outcomes, strict=True)
        if (pause_s := pause_of(outcome, killed_s)) is not None
    }
    again = [
        _case(f"{case.name}-again", _num_tokens(case, outcome, killed_s), 2)
        for case, outcome in zip(cases, outcomes, strict=True)
        if case.name in lost
    ]
    return Failover(
        pool=pool,
        pauses_s=tuple(lost.values()),
        least_s=await _timed(client, again),
        num_failed=sum(outcome.answer is None for outcome in outcomes),
    )


def pause_of(outcome: Outcome, killed_s: float) -> float | None:
    """How long a stream waited for a token after an engine's end; None where it did not lose it.

    Of a stream that had tokens, the gap in which the end falls, if it is longer than usual. Of one
    that had none, the wait for the first: which of these waited for the engine that has ended
    cannot be seen, so all count.
    """
    (arrivals_s,) = outcome.arrivals_s
    if not arrivals_s or outcome.start_s > killed_s:
        return None
    if arrivals_s[0] > killed_s:
        return arrivals_s[0] - killed_s
    gaps = list(itertools.pairwise(arrivals_s))
    across = [gap for gap in gaps if gap[0] <= killed_s + IN_FLIGHT_S and gap[1] > killed_s]
    if not across:
        return None
    begin_s, end_s = max(across, key=lambda gap: gap[1] - gap[0])
    usual_s = median(end - begin for begin, end in gaps)
    return end_s - killed_s if end_s - begin_s >= MIN_PAUSE_RATIO * usual_s else None


def _num_tokens(case: Case, outcome: Outcome, killed_s: float) -> int:
    """Of prompt and answer, when the engine ended."""
    (arrivals_s,) = outcome.arrivals_s
    return len(case.fields["prompt"]) + sum(each <= killed_s for each in arrivals_s)


def _case(name: str, num_prompt: int, num_tokens: int) -> Case:
    fields = {
        "prompt": token_prompt(num_prompt),
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "stream": True,
    }
    return Case(name=name, path="completions", fields=fields)


async def _timed(client: Client, cases: Sequence[Case]) -> float:
    """Asks all at once; the seconds until all have their answer."""
    start_s = time.monotonic()
    await asyncio.gather(*(_ask(client, case) for case in cases))
    return time.monotonic() - start_s


async def _ask(client: Client, case: Case) -> Outcome:
    """With a salt of its own, so that no prefix cache answers."""
    return await client.ask(case, cache_salt=secrets.token_hex(8))


async def _kill_engine(serve_api: ServeApi, pool: Phase) -> float:
    """Kills the engine core of one of a pool's replicas; returns when."""
    for replica in await serve_api.replicas():
        if replica.deployment == pool and replica.pid is not None:
            pid = engine_below(replica.pid)
            if pid is not None and signal_process(pid, signal.SIGKILL):
                break
    return time.monotonic()
