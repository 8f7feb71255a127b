"""Three Ray nodes with addresses of their own: the head with the router, and one for each pool.

They are network namespaces of this machine, each behind a firewall that lets in what the table of
docs/deployment.md says that it must. Every answer is compared with a plain vLLM server's.
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
PROMPTS = ("crosses", "killed", "silent", "prefill cut off", "prefill back", "gone", "after")
"""What the requests are for."""
LONG = ("crosses", "prefill back")
METRICS_PORT = 6385
LOST = ("replica_silent", "connection_lost")
"""Faults of replicas that may be back in a moment."""
WITHIN_S = 240.0
"""For what must happen in the end: engines start again, Ray is sure that a node is dead."""
POLL_S = 0.5
LOOK_S = 0.02
"""Much less than a long answer takes."""

pytestmark = [pytest.mark.nodes, pytest.mark.asyncio(loop_scope="module")]


def body(name: str) -> dict[str, Any]:
    """A long prompt, so that its KV is seen on the wire, or a short one with a long answer."""
    num_prompt, num_answer = (NUM_PROMPT, 20) if name in LONG else (60, 400)
    fields = {
        "prompt": token_prompt(num_prompt, seed=PROMPTS.index(name)),
        "max_tokens": num_answer,
        "ignore_eos": True,
    }
    return Case(name=name, endpoint=COMPLETIONS, fields=fields).body(stream=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := why_not():
        pytest.skip(reason)
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


async def answered(url: str, name: str) -> dict[str, Any]:
    async with asyncio.timeout(WITHIN_S), new_client() as client:
        return await ask(client, url, COMPLETIONS, body(name))


async def seen(
    client: httpx.AsyncClient, cluster: NodeCluster, condition: Callable[[list[Sample]], bool]
) -> list[Sample]:
    """The first look at the router's metrics that meets a condition."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            if condition(samples := await scrape(client, cluster.url)):
                return samples
            await asyncio.sleep(LOOK_S)


def is_decoding(samples: list[Sample]) -> bool:
    return total(samples, "pdserve_inflight", phase="decoding") == 1


def are_paired(samples: list[Sample]) -> bool:
    """Whether both pools have a replica, and these can exchange KV."""
    ready = [total(samples, "pdserve_replicas", pool=pool) for pool in ("prefill", "decode")]
    return ready == [1, 1] and total(samples, "pdserve_unready_pairs") == 0


def num_faults(samples: list[Sample], *faults: str) -> float:
    return sum(total(samples, "pdserve_faults_total", fault=fault) for fault in faults)


def num_moved(samples: list[Sample]) -> float:
    """Requests that have lost the decode replica."""
    return sum(total(samples, "pdserve_moves_total", cause=f"decode_{how}") for how in LOST)


async def test_an_answer_crosses_the_network(
    cluster: NodeCluster, expected: dict[str, Any]
) -> None:
    """The KV cache goes from one node to the other, and not by a way that only one host has."""
    before = kv_on_the_wire(cluster)
    assert not differences(expected["crosses"], await answered(cluster.url, "crosses"))
    assert kv_on_the_wire(cluster) > before + KV_BYTES


def kv_on_the_wire(cluster: NodeCluster) -> int:
    """Bytes that have come from prefill and to decode, at least."""
    prefill, decode = cluster.networks["prefill"], cluster.networks["decode"]
    return min(prefill.num_bytes_sent(), decode.num_bytes_received())


async def test_decode_engine_killed(
    client: httpx.AsyncClient, cluster: NodeCluster, expected: dict[str, Any]
) -> None:
    answer = asyncio.create_task(answered(cluster.url, "killed"))
    before = await seen(client, cluster, is_decoding)
    cluster.engine_core("decode").kill()
    assert not differences(expected["killed"], await answer)
    after = await scrape(client, cluster.url)
    assert num_faults(after, "engine_ended") == num_faults(before, "engine_ended") + 1


async def test_decode_node_cut_off_for_moments(
    client: httpx.AsyncClient, cluster: NodeCluster, expected: dict[str, Any]
) -> None:
    """Until the router misses it, and not so long that Ray does: the same engine goes on."""
    engine = cluster.engine_core("decode")
    answer = asyncio.create_task(answered(cluster.url, "silent"))
    before = await seen(client, cluster, is_decoding)
    with cluster.networks["decode"].cut_off():
        await seen(client, cluster, lambda now: num_moved(now) > num_moved(before))
    assert not differences(expected["silent"], await answer)
    assert cluster.engine_core("decode") == engine
    num_lost = num_faults(before, *LOST) + 1
    await seen(client, cluster, lambda now: num_faults(now, *LOST) == num_lost)


async def test_prefill_node_cut_off_for_moments(
    client: httpx.AsyncClient, cluster: NodeCluster, expected: dict[str, Any]
) -> None:
    """Decode reads the prompt itself; with the node back, its KV crosses the network again."""
    before = await scrape(client, cluster.url)
    with cluster.networks["prefill"].cut_off():
        answer = await answered(cluster.url, "prefill cut off")
        assert not differences(expected["prefill cut off"], answer)
    await seen(client, cluster, lambda now: num_faults(now, *LOST) > num_faults(before, *LOST))
    await seen(client, cluster, are_paired)
    kv_before = kv_on_the_wire(cluster)
    assert not differences(expected["prefill back"], await answered(cluster.url, "prefill back"))
    assert kv_on_the_wire(cluster) > kv_before + KV_BYTES


async def test_decode_node_dies_and_comes_back(
    client: httpx.AsyncClient, cluster: NodeCluster, expected: dict[str, Any]
) -> None:
    """Cut off until Ray calls it dead; Ray then ends it, and whoever runs the node starts it."""
    answer = asyncio.create_task(answered(cluster.url, "gone"))
    before = await seen(client, cluster, is_decoding)
    num_gone = num_faults(before, "node_gone")
    with cluster.networks["decode"].cut_off():
        await seen(client, cluster, lambda now: num_faults(now, "node_gone") > num_gone)
    await asyncio.to_thread(cluster.await_end, "decode")
    cluster.start_worker("decode")
    assert not differences(expected["gone"], await answer)
    # By the way of another node's proxy.
    other_url = cluster.url.replace(cluster.addresses["head"], cluster.addresses["decode"])
    assert not differences(expected["after"], await answered(other_url, "after"))


async def test_the_table_of_ports_is_right(client: httpx.AsyncClient, cluster: NodeCluster) -> None:
    """After all of the above: nobody asked for more than is listed, and each row was used."""
    for address in cluster.addresses.values():
        assert await scrape(client, f"http://{address}:{METRICS_PORT}")
    networks = cluster.networks.items()
    refused = {name: network.refused() for name, network in networks if network.refused()}
    assert not refused
    unused = set(read_rows())
    for name, network in networks:
        for connection in network.accepted():
            unused -= {row for row in unused if row.covers(connection, name, cluster.addresses)}
    assert not unused
