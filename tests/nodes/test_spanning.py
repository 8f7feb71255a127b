"""A decode engine over two Ray nodes, each with a rank, behind the firewalls of docs/deployment.md.

Every answer is compared with a plain vLLM server's. After each end of a part of the engine nothing
of it is left on either node, and another engine has taken its place.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import pytest_asyncio
from answers import differences
from metrics import Sample, total
from node_cluster import NodeCluster
from node_requests import answered, are_paired, is_decoding, num_faults, seen
from port_table import read_rows
from servers import new_client

from cluster.health import observe_health
from kvtransfer.phase import Phase

CONFIG = Path(__file__).parent / "spanning.yaml"
NODES: tuple[Phase, Phase] = ("prefill", "decode")
ENDS_WITHIN_S = 20.0

pytestmark = [pytest.mark.spanning, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with new_client() as client:
        yield client


@pytest.fixture(scope="module")
def cluster(expected: dict[str, Any], nodes_folder: Path) -> Iterator[NodeCluster]:
    folder = nodes_folder / "spanning"
    folder.mkdir()
    with NodeCluster(folder, read_rows(spans_nodes=True), CONFIG) as cluster:
        cluster.start()
        yield cluster


def rank(cluster: NodeCluster, number: int) -> tuple[Phase, psutil.Process]:
    """A rank of the decode engine, and the node that it is on."""
    found = [
        (node, process)
        for node in NODES
        for process in cluster.processes(node, f"VLLM::Worker_TP{number}")
    ]
    (only,) = found
    return only


def follower(cluster: NodeCluster) -> psutil.Process:
    """The actor on the engine's second node."""
    node, _ = rank(cluster, 1)
    (process,) = cluster.processes(node, "ray::Follower")
    return process


def core(cluster: NodeCluster) -> psutil.Process:
    """Of the decode engine: what has started its first rank."""
    _, process = rank(cluster, 0)
    parent = process.parent()
    assert parent is not None
    return parent


def num_ends(samples: list[Sample]) -> float:
    return num_faults(samples, "engine_ended")


async def killed_and_replaced(
    client: httpx.AsyncClient,
    cluster: NodeCluster,
    expected: dict[str, Any],
    name: str,
    victim: psutil.Process,
) -> None:
    """Kills a part of the decode engine while it answers; the answer is whole all the same."""
    parts = [rank(cluster, 0)[1], rank(cluster, 1)[1], core(cluster), follower(cluster)]
    answer = asyncio.create_task(answered(cluster.url, name))
    before = await seen(client, cluster.url, is_decoding)
    victim.kill()
    await seen(client, cluster.url, lambda now: num_ends(now) > num_ends(before))
    _, alive = await asyncio.to_thread(psutil.wait_procs, parts, ENDS_WITHIN_S)
    assert not alive
    assert not differences(expected[name], await answer)
    await seen(client, cluster.url, are_paired)


async def test_ranks_on_two_nodes_answer_as_one_engine(
    client: httpx.AsyncClient, cluster: NodeCluster, expected: dict[str, Any]
) -> None:
    """And read the prompt's KV of a prefill engine that has it in one rank."""
    assert {rank(cluster, 0)[0], rank(cluster, 1)[0]} == set(NODES)
    assert not differences(expected["crosses"], await answered(cluster.url, "crosses"))
    samples = await seen(client, cluster.url, are_paired)
    assert total(samples, "pdserve_routes_total", route="prefill_first") > 0
    assert total(samples, "pdserve_moves_total") == 0


async def test_a_rank_on_the_second_node_killed(
    client: httpx.AsyncClient, cluster: NodeCluster, expected: dict[str, Any]
) -> None:
    node, victim = rank(cluster, 1)
    await killed_and_replaced(client, cluster, expected, "killed", victim)
    said = observe_health(cluster.url, timeout_s=5.0).last_engine_end
    assert said is not None
    assert f"on node {cluster.addresses[node]}, the engine was ended by SIGKILL" in said


async def test_the_engine_core_killed(
    client: httpx.AsyncClient, cluster: NodeCluster, expected: dict[str, Any]
) -> None:
    await killed_and_replaced(client, cluster, expected, "silent", core(cluster))


async def test_nobody_asked_for_more_than_the_table_of_ports(cluster: NodeCluster) -> None:
    assert not cluster.refused()
    assert not [row for row in cluster.unused_rows() if row.is_for_spans]
