"""A request that kills every engine it meets, as far as anybody can tell.

None is known that kills a vLLM engine, so the engine is killed from outside whenever it is seen to
work on the request. It comes alone, so that what works, works on it. Owns that request.
"""

import asyncio
import re
import signal
from collections.abc import Mapping

import httpx

from benchmarks.chaos_cases import Case, token_prompt
from benchmarks.chaos_client import Client
from benchmarks.chaos_processes import engine_below, signal_process
from benchmarks.chaos_routers import Routers
from benchmarks.chaos_verdict import NUM_POISONED, Poison
from benchmarks.systems import RunningSystem

CASE = Case(
    name="poison",
    path="completions",
    fields={"prompt": token_prompt(40), "max_tokens": 900, "ignore_eos": True, "stream": True},
)
_POLL_S = 0.05


async def poison(client: Client, routers: Routers, system: RunningSystem) -> Poison:
    """Sends it to an idle cluster; every engine that it comes to dies, up to one too many."""
    dashboard_url = _dashboard_url(system)
    killed: set[int] = set()
    asked = asyncio.create_task(client.ask(CASE))
    while not asked.done() and len(killed) <= NUM_POISONED:
        seen = await routers.look()
        busy = [name for name, num in seen.num_in_engine.items() if num] if seen else []
        replica_pids = await _replica_pids(dashboard_url) if busy else {}
        for name in busy:
            pid = engine_below(replica_pids[name]) if name in replica_pids else None
            if pid is not None and pid not in killed and signal_process(pid, signal.SIGKILL):
                killed.add(pid)
        await asyncio.sleep(_POLL_S)
    outcome = await asked
    return Poison(num_killed=len(killed), error=outcome.error)


def _dashboard_url(system: RunningSystem) -> str:
    found = re.search(r"dashboard +(http://\S+)", system.log.read_text(errors="replace"))
    if found is None:
        raise RuntimeError("the cluster does not say where its dashboard is")
    return found.group(1)


async def _replica_pids(dashboard_url: str) -> Mapping[str, int]:
    """The processes of Serve's replicas, by the names that the metrics have for them."""
    async with httpx.AsyncClient(timeout=10.0) as client:
        response = await client.get(f"{dashboard_url}/api/serve/applications/")
    response.raise_for_status()
    return {
        replica["replica_id"]: replica["pid"]
        for application in response.json()["applications"].values()
        for deployment in application["deployments"].values()
        for replica in deployment["replicas"]
        if replica["pid"] is not None
    }
