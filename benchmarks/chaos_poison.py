"""A request that kills every engine it meets, as far as anybody can tell.

None is known that kills a vLLM engine, so the engine is killed from outside whenever it is seen to
work on the request. It comes alone, so that what works, works on it. Owns that request.
"""

import asyncio
import signal

from benchmarks.chaos_cases import Case, token_prompt
from benchmarks.chaos_client import Client
from benchmarks.chaos_processes import engine_below, signal_process
from benchmarks.chaos_routers import Routers
from benchmarks.chaos_verdict import NUM_POISONED, Poison
from benchmarks.serve_api import ServeApi

CASE = Case(
    name="poison",
    path="completions",
    fields={"prompt": token_prompt(40), "max_tokens": 900, "ignore_eos": True, "stream": True},
)
_POLL_S = 0.05


async def poison(client: Client, routers: Routers, serve_api: ServeApi) -> Poison:
    """Sends it to an idle cluster; every engine that it comes to dies, up to one too many."""
    killed: set[int] = set()
    asked = asyncio.create_task(client.ask(CASE))
    while not asked.done() and len(killed) <= NUM_POISONED:
        seen = await routers.look()
        busy = [name for name, num in seen.num_in_engine.items() if num] if seen else []
        for replica in await serve_api.replicas() if busy else ():
            if replica.replica_id not in busy or replica.pid is None:
                continue
            pid = engine_below(replica.pid)
            if pid is not None and pid not in killed and signal_process(pid, signal.SIGKILL):
                killed.add(pid)
        await asyncio.sleep(_POLL_S)
    outcome = await asked
    return Poison(num_killed=len(killed), error=outcome.error)
