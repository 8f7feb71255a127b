"""Two routers and two decode replicas, and what becomes of answers when one of them leaves."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import httpx
import psutil
import pytest
import pytest_asyncio
from answers import COMPLETIONS, ask, comparable, differences
from cases import Case, token_prompt
from metrics import Sample, scrape, total
from scaling import SCALING_POLL_S, until_scaled
from servers import CONFIG, Server, new_client

from benchmarks.chaos_processes import (
    RouterProcess,
    count_connections,
    find_routers,
    suspend,
)
from benchmarks.serve_api import ServeApi

ONE_EACH = {"router": 1, "decode": 1}
TWO_EACH = {"router": 2, "decode": 2}
BEGIN_WITHIN_S = 30.0
FREE_WITHIN_S = 2.0
LEFT_WITHIN_S = 20.0
ROUTER_LEFT_WITHIN_S = 90.0
"""More than `drain_s`, and what is asked meanwhile."""
POLL_S = 0.05
STUCK_AFTER_S = 2.0
"""Longer than short answers take."""

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with new_client() as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def serve_api(
    client: httpx.AsyncClient, both_servers: tuple[Server, Server]
) -> AsyncIterator[ServeApi]:
    """Of the cluster with two routers and two decode replicas; in the end there is one of each."""
    api = ServeApi(both_servers[0].log, CONFIG)
    await api.scale(TWO_EACH)
    yield api
    await api.scale(ONE_EACH)
    await until_scaled(api, ONE_EACH)


async def two_routers(
    client: httpx.AsyncClient,
    api: ServeApi,
    cluster: Server,
    *,
    nums: Mapping[str, int] = TWO_EACH,
) -> list[RouterProcess]:
    """So many are there, and the proxy sends requests to both routers."""
    await until_scaled(api, nums)
    short = [body | {"max_tokens": 1} for body in bodies(first_seed=900)]
    deadline_s = time.monotonic() + BEGIN_WITHIN_S
    while True:
        routers = find_routers(cluster.process)
        looks = [await look(client, router) for router in routers]
        if [total(samples, "pdserve_requests_total") > 0 for samples in looks] == [True, True]:
            return routers
        assert time.monotonic() < deadline_s, routers
        await answers(client, cluster, short)


async def another_starts(api: ServeApi, known: set[str]) -> None:
    """Returns once Serve lists a replica that was not known before."""
    deadline_s = time.monotonic() + LEFT_WITHIN_S
    while {each.replica_id for each in await api.replicas()} <= known:
        assert time.monotonic() < deadline_s, "Serve starts no other"
        await asyncio.sleep(SCALING_POLL_S)


def bodies(first_seed: int, *, stream: bool = True) -> list[dict[str, Any]]:
    return [
        Case(
            name="",
            endpoint=COMPLETIONS,
            fields={
                "prompt": token_prompt(60, seed=first_seed + index),
                "max_tokens": 400,
                "ignore_eos": True,
            },
        ).body(stream=stream)
        for index in range(12)
    ]


async def answers(
    client: httpx.AsyncClient, server: Server, asked: Sequence[dict[str, Any]]
) -> list[Any]:
    """The answers, or the errors in their places."""
    coroutines = (ask(client, server.url, COMPLETIONS, each) for each in asked)
    return list(await asyncio.gather(*coroutines, return_exceptions=True))


async def look(client: httpx.AsyncClient, router: RouterProcess) -> list[Sample]:
    return await scrape(client, f"http://127.0.0.1:{router.port}")


def num_sent(samples: list[Sample]) -> float:
    """Requests of this router."""
    return total(samples, "pdserve_inflight")


def num_in_engines(samples: list[Sample]) -> float:
    """Requests of all routers."""
    return total(samples, "pdserve_replica_running") + total(samples, "pdserve_replica_waiting")


def num_moves(samples: list[Sample]) -> float:
    return total(samples, "pdserve_moves_total")


async def decoding(
    client: httpx.AsyncClient,
    cluster: Server,
    asked: Sequence[dict[str, Any]],
    *,
    routers: Sequence[RouterProcess],
) -> tuple[asyncio.Task[list[Any]], list[list[Sample]]]:
    """Asks, and waits until each router writes answers: their task, and what each router says then.

    Looks without a pause, and asks again where all was over before it was seen: on a busy machine
    a look may take longer than the answers.
    """
    deadline_s = time.monotonic() + BEGIN_WITHIN_S
    answering = asyncio.create_task(answers(client, cluster, asked))
    while True:
        looks = await asyncio.gather(*(look(client, router) for router in routers))
        nums = [total(samples, "pdserve_inflight", phase="decoding") for samples in looks]
        if all(num >= 2 for num in nums):
            return answering, looks
        assert time.monotonic() < deadline_s, nums
        if answering.done():
            answering = asyncio.create_task(answers(client, cluster, asked))


async def test_decode_replica_told_to_end(
    client: httpx.AsyncClient, serve_api: ServeApi, cluster: Server, plain: Server
) -> None:
    """SIGTERM, as before a spot machine is taken away: what it has it finishes, then it leaves."""
    asked = bodies(first_seed=200)
    expected = await answers(client, plain, asked)
    routers = await two_routers(client, serve_api, cluster)
    known = {each.replica_id for each in await serve_api.replicas()}
    leaving, _ = cluster.processes("ray::ServeReplica:pdserve:decode")
    answering, before = await decoding(client, cluster, asked, routers=routers)
    leaving.terminate()
    assert not differences(expected, await answering)
    after = [await look(client, router) for router in routers]
    assert [num_moves(samples) for samples in after] == [num_moves(samples) for samples in before]
    assert all(total(samples, "pdserve_replicas", pool="decode") == 1 for samples in after)
    await asyncio.to_thread(leaving.wait, LEFT_WITHIN_S)
    await another_starts(serve_api, known)


async def test_router_told_to_end(
    client: httpx.AsyncClient, serve_api: ServeApi, cluster: Server, plain: Server
) -> None:
    """SIGTERM: it finishes its answers, and whoever comes meanwhile is answered as well."""
    # A decode replica that has just been ended may still be on its way back.
    victim, _ = await two_routers(client, serve_api, cluster, nums={"router": 2})
    asked = bodies(first_seed=500)
    expected = await answers(client, plain, asked)
    known = {each.replica_id for each in await serve_api.replicas()}

    async def ask_until_gone() -> list[list[Any]]:
        rounds = []
        while psutil.pid_exists(victim.pid):
            rounds.append(await answers(client, cluster, asked))
        return rounds

    async with asyncio.timeout(ROUTER_LEFT_WITHIN_S):
        answering = asyncio.create_task(ask_until_gone())
        while not num_sent(await look(client, victim)):
            pass
        psutil.Process(victim.pid).terminate()
        for actual in await answering:
            assert not differences(expected, actual)
    await another_starts(serve_api, known)


async def test_router_killed(
    client: httpx.AsyncClient, serve_api: ServeApi, cluster: Server, plain: Server
) -> None:
    """Its clients' connections end; the engines drop its requests; the other's are not touched."""
    victim, other = await two_routers(client, serve_api, cluster)
    # So many that the other router's are still under way when the engines have been looked at.
    asked = [*bodies(first_seed=300), *bodies(first_seed=700)]
    expected = await answers(client, plain, asked)
    answering, _ = await decoding(client, cluster, asked, routers=(victim, other))
    # Between a look and the kill it could get more.
    suspend(victim.pid)
    num_connections = count_connections(victim)
    psutil.Process(victim.pid).kill()
    deadline_s = time.monotonic() + FREE_WITHIN_S
    while num_in_engines(samples := await look(client, other)) > num_sent(samples):
        assert time.monotonic() < deadline_s, "an engine works for a router that is dead"
        await asyncio.sleep(POLL_S)
    # The other's may all have ended by then, on a machine that looks slowly: see what they said.
    actual = await answering
    broken = [each for each in actual if not isinstance(each, dict)]
    assert all(isinstance(each, httpx.RemoteProtocolError) for each in broken), broken
    assert 0 < len(broken) <= num_connections
    for one, answer in zip(expected, actual, strict=True):
        assert answer in broken or not differences(one, answer)


async def test_router_killed_before_it_has_answered(
    client: httpx.AsyncClient, serve_api: ServeApi, cluster: Server, plain: Server
) -> None:
    """The proxy asks the other one, also where a request's body came later than its headers."""
    victim, _ = await two_routers(client, serve_api, cluster)
    known = {each.replica_id for each in await serve_api.replicas()}
    asked = [body | {"max_tokens": 4} for body in bodies(first_seed=600, stream=False)]
    expected = await answers(client, plain, asked)
    suspend(victim.pid)
    tasks = [asyncio.create_task(ask_slowly(client, cluster, body)) for body in asked]
    _, stuck = await asyncio.wait(tasks, timeout=STUCK_AFTER_S)
    assert stuck
    psutil.Process(victim.pid).kill()
    assert not differences(expected, await asyncio.gather(*tasks))
    await another_starts(serve_api, known)


async def ask_slowly(
    client: httpx.AsyncClient, server: Server, body: dict[str, Any]
) -> dict[str, Any]:
    """The proxy sees the headers, and a while later the body."""
    content = json.dumps(body).encode()

    async def parts() -> AsyncIterator[bytes]:
        await asyncio.sleep(POLL_S)
        yield content

    headers = {"Content-Type": "application/json", "Content-Length": str(len(content))}
    response = await client.post(server.url + COMPLETIONS, content=parts(), headers=headers)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = comparable(response.json())
    return answer


async def test_scaled_down_under_load(
    client: httpx.AsyncClient, serve_api: ServeApi, cluster: Server, plain: Server
) -> None:
    """What a router or a decode replica has when it is to leave, it finishes."""
    routers = await two_routers(client, serve_api, cluster)
    asked = bodies(first_seed=400)
    expected = await answers(client, plain, asked)
    answering, before = await decoding(client, cluster, asked, routers=routers)
    await serve_api.scale(ONE_EACH)
    assert not differences(expected, await answering)
    await until_scaled(serve_api, ONE_EACH)
    (left,) = find_routers(cluster.process)
    assert num_moves(await look(client, left)) == num_moves(before[routers.index(left)])
