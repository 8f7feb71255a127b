"""Whether a cluster that has been shot at can still take in a replica.

What bytes at a port have ended may be needed only then: a thread that answers new peers, say. Owns
how that is seen: a replica is killed, and another one has to come and be ready with every peer.
"""

import asyncio
import time

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.chaos_faults import Kind
from benchmarks.chaos_processes import find_members, send
from benchmarks.chaos_routers import Routers
from kvtransfer.phase import Phase

_POLL_S = 1.0
_TIMEOUT_S = 10.0
_UNREADY_PAIRS = "pdserve_unready_pairs"


async def replace_one(
    leader: psutil.Process,
    routers: Routers,
    *,
    num_replicas: dict[Phase, int],
    within_s: float,
) -> tuple[str, ...]:
    """Kills a decode replica; says what is not whole again after `within_s`, one line each."""
    member = find_members(leader)["decode"][0]
    send(Kind.KILL_REPLICA, member)
    deadline_s = time.monotonic() + within_s
    while True:
        await asyncio.sleep(_POLL_S)
        missing = await _missing(routers, num_replicas)
        pids = {each.pid for each in find_members(leader)["decode"]}
        # By the time that a successor runs, the routers have long noticed the death.
        replaced = member.pid not in pids and len(pids) == num_replicas["decode"]
        if replaced and not missing:
            return ()
        if time.monotonic() >= deadline_s:
            return missing or ("no replica has come for the one that was killed",)


async def _missing(routers: Routers, num_replicas: dict[Phase, int]) -> tuple[str, ...]:
    seen = await routers.look()
    if seen is None or not routers.are_complete:
        return ("a router does not answer",)
    lines = [
        f"{pool} has {seen.num_live[pool]} replicas, not {num}"
        for pool, num in num_replicas.items()
        if seen.num_live[pool] != num
    ]
    for router in routers.live:
        if num := await _num_unready_pairs(router.port):
            lines.append(f"a router knows {num:g} pairs that are not ready")
    return tuple(lines)


async def _num_unready_pairs(port: int) -> float:
    try:
        async with httpx.AsyncClient(timeout=_TIMEOUT_S) as client:
            text = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
    except httpx.HTTPError:
        return 1.0  # Whether they are ready is not known: not yet.
    return unready_pairs(text)


def unready_pairs(metrics: str) -> float:
    """How many pairs of engines a router cannot use yet, from its metrics."""
    return sum(
        float(sample.value)
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if sample.name == _UNREADY_PAIRS
    )
