"""Three Ray nodes with addresses of their own: the head with the router, and one for each pool.

They are network namespaces of this machine, each behind a firewall that lets in what the table of
docs/deployment.md says that it must. Every answer is compared with a plain vLLM server's.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from answers import differences
from metrics import Sample, scrape, total
from node_cluster import NodeCluster
from node_requests import NUM_PROMPT, WITHIN_S, answered, are_paired, is_decoding, num_faults, seen
from port_table import read_rows
from servers import new_client

from benchmarks.audit import audit

KV_BYTES = NUM_PROMPT * 4096
"""Keys and values of a prompt: 4 layers with 2 heads of 64, in float32."""
METRICS_PORT = 6385
LOST = ("replica_silent", "connection_lost")
"""Faults of replicas that may be back in a moment."""
POLL_S = 0.5

pytestmark = [pytest.mark.nodes, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with new_client() as client:
        yield client


@pytest.fixture(scope="module")
def cluster(expected: dict[str, Any], nodes_folder: Path) -> Iterator[NodeCluster]:
    with NodeCluster(nodes_folder, read_rows()) as cluster:
        cluster.start()
        yield cluster


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def nothing_left(cluster: NodeCluster) -> AsyncIterator[None]:
    yield
    deadline_s = time.monotonic() + WITHIN_S
    while left := await audit(cluster.url):
        assert time.monotonic() < deadline_s, left
        await asyncio.sleep(POLL_S)


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
    before = await seen(client, cluster.url, is_decoding)
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
    before = await seen(client, cluster.url, is_decoding)
    with cluster.networks["decode"].cut_off():
        await seen(client, cluster.url, lambda now: num_moved(now) > num_moved(before))
    assert not differences(expected["silent"], await answer)
    assert cluster.engine_core("decode") == engine
    num_lost = num_faults(before, *LOST) + 1
    await seen(client, cluster.url, lambda now: num_faults(now, *LOST) == num_lost)


async def test_prefill_node_cut_off_for_moments(
    client: httpx.AsyncClient, cluster: NodeCluster, expected: dict[str, Any]
) -> None:
    """Decode reads the prompt itself; with the node back, its KV crosses the network again."""
    before = await scrape(client, cluster.url)
    with cluster.networks["prefill"].cut_off():
        answer = await answered(cluster.url, "prefill cut off")
        assert not differences(expected["prefill cut off"], answer)
    await seen(client, cluster.url, lambda now: num_faults(now, *LOST) > num_faults(before, *LOST))
    await seen(client, cluster.url, are_paired)
    kv_before = kv_on_the_wire(cluster)
    assert not differences(expected["prefill back"], await answered(cluster.url, "prefill back"))
    assert kv_on_the_wire(cluster) > kv_before + KV_BYTES


async def test_decode_node_dies_and_comes_back(
    client: httpx.AsyncClient, cluster: NodeCluster, expected: dict[str, Any]
) -> None:
    """Cut off until Ray calls it dead; Ray then ends it, and whoever runs the node starts it."""
    answer = asyncio.create_task(answered(cluster.url, "gone"))
    before = await seen(client, cluster.url, is_decoding)
    num_gone = num_faults(before, "node_gone")
    with cluster.networks["decode"].cut_off():
        await seen(client, cluster.url, lambda now: num_faults(now, "node_gone") > num_gone)
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
    assert not cluster.refused()
    assert not cluster.unused_rows()
