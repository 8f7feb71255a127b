"""Engines that die: nothing of them is left, no request is lost, and Serve replaces them."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import psutil
from answers import COMPLETIONS, ask, differences
from cases import Case, token_prompt
from metrics import Sample, scrape, total
from servers import CONFIG, DECODE, PREFILL, Server

from benchmarks.serve_api import ServeApi
from engine import guardian

ENGINE = "VLLM::"
GUARDIAN = guardian.__file__
"""It ends the others and stays some seconds, to see that none comes back."""
GONE_WITHIN_S = 5.0
REPLACED_WITHIN_S = 150.0
BEGINS_WITHIN_S = 20.0
POLL_S = 0.5


def body(seed: int, *, num_prompt: int = 100, **fields: Any) -> dict[str, Any]:
    common = {"prompt": token_prompt(num_prompt, seed=seed), "max_tokens": 400, "ignore_eos": True}
    return Case(name="", endpoint=COMPLETIONS, fields=common | fields).body()


async def answers(
    client: httpx.AsyncClient, server: Server, bodies: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    return await asyncio.gather(*(ask(client, server.url, COMPLETIONS, each) for each in bodies))


async def seen(
    client: httpx.AsyncClient, cluster: Server, condition: Callable[[list[Sample]], bool]
) -> list[Sample]:
    """The first look at the router's metrics that meets a condition."""
    deadline_s = time.monotonic() + BEGINS_WITHIN_S
    while not condition(samples := await scrape(client, cluster.url)):
        assert time.monotonic() < deadline_s, "it did not come so far"
    return samples


def num_in(samples: list[Sample], phase: str) -> float:
    return total(samples, "pdserve_inflight", phase=phase)


def num_moves(samples: list[Sample], cause: str) -> float:
    return total(samples, "pdserve_moves_total", cause=cause)


def replica(cluster: Server, pool: str) -> psutil.Process:
    (process,) = cluster.processes(f"ray::ServeReplica:pdserve:{pool}")
    return process


def engine_core(cluster: Server, pool: str) -> psutil.Process:
    children = replica(cluster, pool).children(recursive=True)
    (process,) = (child for child in children if ENGINE in " ".join(child.cmdline()))
    return process


def is_alive(process: psutil.Process) -> bool:
    """Whether it still does or holds anything; a zombie only waits for its parent's look."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def gone(processes: Sequence[psutil.Process]) -> None:
    """Waits until all of them have ended."""
    deadline_s = time.monotonic() + GONE_WITHIN_S
    while left := [each for each in processes if is_alive(each)]:
        assert time.monotonic() < deadline_s, left
        await asyncio.sleep(0.1)


async def replaced(client: httpx.AsyncClient, cluster: Server, plain: Server) -> None:
    """Waits until the cluster is whole again and checks that it answers as before."""
    deadline_s = time.monotonic() + REPLACED_WITHIN_S
    while (await client.get(f"{cluster.url}/health")).status_code != 200:
        assert time.monotonic() < deadline_s, "the replica was not replaced"
        await asyncio.sleep(POLL_S)
    for seed in (1, 2):
        request = body(seed, max_tokens=20)
        expected = await ask(client, plain.url, COMPLETIONS, request)
        actual = await ask(client, cluster.url, COMPLETIONS, request)
        assert not differences(expected, actual)


async def test_prefill_replica_killed(
    client: httpx.AsyncClient, cluster: Server, plain: Server
) -> None:
    """Its requests, and those that come while it is being replaced, are answered all the same."""
    victim = replica(cluster, PREFILL)
    owned = [each for each in victim.children(recursive=True) if GUARDIAN not in each.cmdline()]
    assert any(ENGINE in " ".join(each.cmdline()) for each in owned)
    bodies = [
        body(seed, num_prompt=480, max_tokens=20, stream=bool(seed % 2)) for seed in range(20, 50)
    ]
    expected = await answers(client, plain, bodies)
    asked = asyncio.create_task(answers(client, cluster, bodies))
    before = await seen(client, cluster, lambda samples: num_in(samples, "prefilling") > 10)
    victim.kill()
    await gone(owned)
    assert not differences(expected, await asked)
    after = await scrape(client, cluster.url)
    assert num_moves(after, "prefill_connection_lost") > num_moves(before, "prefill_died")
    await replaced(client, cluster, plain)


async def test_decode_engine_core_killed(
    client: httpx.AsyncClient, cluster: Server, plain: Server
) -> None:
    """In the middle of a stream, and it is the only one: the client sees a pause."""
    bodies = [body(5, stream=True), body(6)]
    expected = await answers(client, plain, bodies)
    asked = asyncio.create_task(answers(client, cluster, bodies[:1]))
    before = await seen(client, cluster, lambda samples: num_in(samples, "decoding") == 1)
    engine_core(cluster, DECODE).kill()
    late = asyncio.create_task(answers(client, cluster, bodies[1:]))
    async with asyncio.timeout(REPLACED_WITHIN_S):
        assert not differences(expected, await asked + await late)
    after = await scrape(client, cluster.url)
    assert num_moves(after, "decode_engine_ended") > num_moves(before, "decode_died")
    await replaced(client, cluster, plain)


async def running(api: ServeApi) -> set[str]:
    """The replicas that Serve lists as running; none where it does not answer."""
    try:
        return {each.replica_id for each in await api.replicas() if each.state == "RUNNING"}
    except httpx.HTTPError:
        return set()


async def test_serves_controller_killed(
    client: httpx.AsyncClient, cluster: Server, plain: Server
) -> None:
    """The one that Ray starts in its place finds the replicas as they were, and keeps them."""
    api = ServeApi(cluster.log, CONFIG)
    before = await running(api)
    assert len(before) == 3
    (controller,) = cluster.processes("ray::ServeController")
    controller.kill()
    deadline_s = time.monotonic() + REPLACED_WITHIN_S
    while len(after := await running(api)) < len(before):
        assert time.monotonic() < deadline_s, f"of {before} there are {after}"
        await asyncio.sleep(POLL_S)
    assert after == before
    await replaced(client, cluster, plain)
