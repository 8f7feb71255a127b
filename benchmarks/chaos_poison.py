"""A request that kills every engine it meets, as far as anybody can tell.

None is known that kills a vLLM engine, so the engine is killed from outside whenever it is seen to
work on the request. One router has that request alone, so that what works for it, works on it; all
others meanwhile have requests whose engines it kills, and which may not suffer for it. Owns these.
"""

import asyncio
import signal
from collections.abc import Sequence
from itertools import cycle

from benchmarks.chaos_cases import Case, token_prompt
from benchmarks.chaos_client import Client, Outcome
from benchmarks.chaos_metrics import scrape
from benchmarks.chaos_processes import RouterProcess, engine_below, signal_process
from benchmarks.chaos_routers import Routers
from benchmarks.chaos_verdict import NUM_POISONED, Poison
from benchmarks.serve_api import ServeApi

CASE = Case(
    name="poison",
    path="completions",
    fields={"prompt": token_prompt(40), "max_tokens": 900, "ignore_eos": True, "stream": True},
)
NUM_INNOCENT = 6
"""Under way at any time, of each router that does not have the poison."""
_POLL_S = 0.05


async def poison(
    routers: Routers, serve_api: ServeApi, innocent: Sequence[Case], *, timeout_s: float
) -> tuple[Poison, list[Outcome]]:
    """Sends it to one router of an idle cluster; every engine that it comes to dies, up to one too
    many. Also returns what became of the innocent requests."""
    first, *others = routers.live
    outcomes: list[Outcome] = []
    asked = asyncio.create_task(_client(first, timeout_s).ask(CASE))
    async with asyncio.TaskGroup() as tasks:
        for number in range(NUM_INNOCENT * len(others)):
            client = _client(others[number % len(others)], timeout_s)
            cases = [*innocent[number:], *innocent[:number]]
            tasks.create_task(_keep_asking(client, cases, asked, outcomes))
        num_killed = await _kill_what_works(first, serve_api, asked)
    return Poison(num_killed=num_killed, error=(await asked).error), outcomes


async def _keep_asking(
    client: Client, cases: Sequence[Case], until: asyncio.Task[Outcome], outcomes: list[Outcome]
) -> None:
    for case in cycle(cases):
        outcomes.append(await client.ask(case))
        if until.done():
            return


async def _kill_what_works(
    router: RouterProcess, serve_api: ServeApi, asked: asyncio.Task[Outcome]
) -> int:
    """Kills each engine that works for a router; returns how many were."""
    killed: set[int] = set()
    while not asked.done() and len(killed) <= NUM_POISONED:
        pids = {
            replica.replica_id: engine_below(replica.pid)
            for replica in await serve_api.replicas()
            if replica.deployment == "decode" and replica.pid is not None
        }
        # Last of all, and of decode, which has it for long: where it has been, others are innocent.
        seen = await scrape(router.port)
        for replica_id in seen.with_own if seen else ():
            pid = pids.get(replica_id)
            if pid is not None and pid not in killed and signal_process(pid, signal.SIGKILL):
                killed.add(pid)
        await asyncio.sleep(_POLL_S)
    return len(killed)


def _client(router: RouterProcess, timeout_s: float) -> Client:
    """Past the proxy, which chooses the router."""
    return Client(f"http://127.0.0.1:{router.port}/v1", timeout_s=timeout_s)
