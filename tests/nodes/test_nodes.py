"""Three Ray nodes with addresses of their own: the head with the router, and one for each pool.

They are network namespaces of this machine, each behind a firewall that lets in what README.md
says that it must. Every answer is compared with a plain vLLM server's.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from answers import COMPLETIONS, ask, differences
from cases import Case, token_prompt
from metrics import Sample, scrape, total
from node_cluster import NodeCluster
from node_network import why_not
from port_table import read_rows
from servers import await_line, new_client, plain_server

from benchmarks.audit import audit

NUM_PROMPT = 480
KV_BYTES = NUM_PROMPT * 4096
"""Keys and values of a prompt: 4 layers with 2 heads of 64, in float32."""
PROMPTS = {"crosses": 0, "killed": 1, "silent": 2, "gone": 3, "after": 4}
WITHIN_S = 240.0
"""For what must happen in the end: engines start again, Ray is sure that a node is dead."""
POLL_S = 0.5

MISSING = why_not()
pytestmark = [
    pytest.mark.nodes,
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
    pytest.mark.asyncio(loop_scope="module"),
]


def body(name: str) -> dict[str, Any]:
    """A long prompt, so that its KV is seen on the wire, or a short one with a long answer."""
    num_prompt, num_answer = (NUM_PROMPT, 20) if name == "crosses" else (60, 400)
    fields = {
        "prompt": token_prompt(num_prompt, seed=PROMPTS[name]),
        "max_tokens": num_answer,
        "ignore_eos": True,
    }
    return Case(name=name, endpoint=COMPLETIONS, fields=fields).body(stream=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nodes")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with new_client() as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def expected(client: httpx.AsyncClient, folder: Path) -> dict[str, Any]:
    """One engine's answers."""
    with plain_server(folder / "plain.log") as plain:
        await_line(plain, "Application startup complete")
        return {name: await ask(client, plain.url, COMPLETIONS, body(name)) for name in PROMPTS}


@pytest.fixture(scope="module")
def cluster(expected: dict[str, Any], folder: Path) -> Iterator[NodeCluster]:
    """Starts when the plain server has ended: two cores are few."""
    with NodeCluster(folder) as cluster:
        cluster.start()
        yield cluster


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def nothing_left(cluster: NodeCluster) -> AsyncIterator[None]:
    yield
    deadline_s = time.monotonic() + WITHIN_S
    while left := await audit(cluster.url):
        assert time.monotonic() < deadline_s, left
        await asyncio.sleep(POLL_S)


class Answer:
    """One that is being written. Owns its task."""

    def __init__(self, client: httpx.AsyncClient, cluster: NodeCluster, name: str) -> None:
        self._task = asyncio.create_task(ask(client, cluster.url, COMPLETIONS, body(name)))

    async def whole(self) -> dict[str, Any]:
        async with asyncio.timeout(WITHIN_S):
            return await self._task


async def seen(
    client: httpx.AsyncClient, cluster: NodeCluster, condition: Callable[[list[Sample]], bool]
) -> list[Sample]:
    """The first look at the router's metrics that meets a condition; looks without a pause."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            if condition(samples := await scrape(client, cluster.url)):
                return samples


def is_decoding(samples: list[Sample]) -> bool:
    return total(samples, "pdserve_inflight", phase="decoding") == 1


def num_faults(samples: list[Sample], *faults: str) -> float:
    name = "pdserve_faults_total"
    return sum(total(samples, name, pool="decode", fault=fault) for fault in faults)


async def test_an_answer_crosses_the_network(
    client: httpx.AsyncClient, cluster: NodeCluster, expected: dict[str, Any]
) -> None:
    """The KV cache goes from one node to the other, and not by a way that only one host has."""
    prefill, decode = cluster.networks["prefill"], cluster.networks["decode"]
    sent, received = prefill.num_bytes_sent(), decode.num_bytes_received()
    answer = await Answer(client, cluster, "crosses").whole()
    assert not differences(expected["crosses"], answer)
    assert prefill.num_bytes_sent() - sent > KV_BYTES
    assert decode.num_bytes_received() - received > KV_BYTES


async def test_decode_engine_killed(
    client: httpx.AsyncClient, cluster: NodeCluster, expected: dict[str, Any]
) -> None:
    answer = Answer(client, cluster, "killed")
    before = await seen(client, cluster, is_decoding)
    cluster.engine_core("decode").kill()
    assert not differences(expected["killed"], await answer.whole())
    after = await scrape(client, cluster.url)
    assert num_faults(after, "engine_ended") == num_faults(before, "engine_ended") + 1


async def test_decode_node_cut_off_for_moments(
    client: httpx.AsyncClient, cluster: NodeCluster, expected: dict[str, Any]
) -> None:
    """Until the router misses it, and not so long that Ray does: the same engine goes on."""
    engine = cluster.engine_core("decode")
    answer = Answer(client, cluster, "silent")
    before = await seen(client, cluster, is_decoding)
    with cluster.networks["decode"].cut_off():
        lost = ("replica_silent", "connection_lost")
        await seen(client, cluster, lambda now: num_faults(now, *lost) > num_faults(before, *lost))
    assert not differences(expected["silent"], await answer.whole())
    assert cluster.engine_core("decode") == engine


async def test_decode_node_dies_and_comes_back(
    client: httpx.AsyncClient, cluster: NodeCluster, expected: dict[str, Any]
) -> None:
    """Cut off until Ray calls it dead; Ray then ends it, and whoever runs the node starts it."""
    answer = Answer(client, cluster, "gone")
    before = await seen(client, cluster, is_decoding)
    gone_before = num_faults(before, "node_gone")
    with cluster.networks["decode"].cut_off():
        await seen(client, cluster, lambda now: num_faults(now, "node_gone") > gone_before)
    await asyncio.to_thread(cluster.await_end, "decode")
    cluster.start_worker("decode")
    assert not differences(expected["gone"], await answer.whole())
    after = await Answer(client, cluster, "after").whole()
    assert not differences(expected["after"], after)


async def test_the_table_of_ports_is_right(cluster: NodeCluster) -> None:
    """After all of the above: nobody asked for more than README.md lists, and each row was used."""
    unused = set(read_rows())
    for name, network in cluster.networks.items():
        assert not network.refused(), name
        for connection in network.accepted():
            unused -= {row for row in unused if row.covers(connection, name, cluster.addresses)}
    assert not unused
