"""Engines that die: nothing of them is left, no request is lost, and Serve replaces them."""

import asyncio
import time
from typing import Any

import httpx
import psutil
from answers import COMPLETIONS, ask, differences
from cases import Case, token_prompt
from servers import DECODE, PREFILL, Server

from engine import guardian

ENGINE = "VLLM::"
GUARDIAN = guardian.__file__
"""It ends the others and stays some seconds, to see that none comes back."""
GONE_WITHIN_S = 5.0
REPLACED_WITHIN_S = 150.0
POLL_S = 0.5


def body(seed: int, **fields: Any) -> dict[str, Any]:
    common = {"prompt": token_prompt(100, seed=seed), "max_tokens": 400, "ignore_eos": True}
    return Case(name="", endpoint=COMPLETIONS, fields=common | fields).body()


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
    bodies = [body(seed, max_tokens=60, stream=bool(seed % 2)) for seed in range(20, 32)]
    expected = [await ask(client, plain.url, COMPLETIONS, each) for each in bodies]
    asked = [asyncio.create_task(ask(client, cluster.url, COMPLETIONS, each)) for each in bodies]
    await asyncio.sleep(0.05)  # some are in prefill, some wait, some are in decode
    victim.kill()
    deadline_s = time.monotonic() + GONE_WITHIN_S
    while left := [each for each in owned if is_alive(each)]:
        assert time.monotonic() < deadline_s, left
        await asyncio.sleep(0.1)
    for one, task in zip(expected, asked, strict=True):
        assert not differences(one, await task)
    await replaced(client, cluster, plain)


async def test_decode_engine_core_killed(
    client: httpx.AsyncClient, cluster: Server, plain: Server
) -> None:
    """In the middle of a stream, and it is the only one: the client sees a pause."""
    request = body(5, stream=True)
    expected = await ask(client, plain.url, COMPLETIONS, request)
    asked = asyncio.create_task(ask(client, cluster.url, COMPLETIONS, request))
    await asyncio.sleep(0.3)
    assert not asked.done()
    engine_core(cluster, DECODE).kill()
    late = asyncio.create_task(ask(client, cluster.url, COMPLETIONS, body(6)))
    async with asyncio.timeout(REPLACED_WITHIN_S):
        assert not differences(expected, await asked)
        assert not differences(await ask(client, plain.url, COMPLETIONS, body(6)), await late)
    await replaced(client, cluster, plain)
