"""The adapter to vLLM's front end: what it is told, what it is given."""

import ast
from pathlib import Path
from typing import Any

import pytest
from core_clusters import Cluster
from fake_replicas import decoded, end_of, prefilled, request, step
from vllm.v1.engine import FinishReason

import router
from engine.output_tokens import OUTPUT_TOKENS
from engine.step_limit import STEP_LIMIT
from engine.wire import Kind
from router.core_client import ClusterCoreClient

ROUTER = Path(router.__file__).parent


@pytest.mark.parametrize(
    "mine",
    [
        pytest.param(
            {"kv_transfer_params": {"do_remote_prefill": True, "remote_host": "10.0.0.1"}},
            id="where-its-kv-comes-from",
        ),
        pytest.param({OUTPUT_TOKENS: [1, 2]}, id="which-tokens-it-has"),
        pytest.param({STEP_LIMIT: 1e-9}, id="in-which-pieces-it-is-prefilled"),
    ],
)
async def test_what_no_client_can_say(mine: dict[str, Any]) -> None:
    cluster = Cluster()
    client = ClusterCoreClient(cluster.core)
    await client.add_request_async(request("mine", extra_args=mine))
    await client.add_request_async(request("plain"))
    said, unsaid = (each.sampling_params for each in end_of(cluster.prefill[0]).added())
    assert said is not None
    assert unsaid is not None
    assert said.extra_args == unsaid.extra_args


async def test_what_engines_compute_is_handed_on_and_the_rest_of_an_answer_may_be_cancelled() -> (
    None
):
    cluster = Cluster()
    client = ClusterCoreClient(cluster.core)
    await client.add_request_async(request())
    assert client.dp_engines_running()
    step(cluster.prefill[0], prefilled())
    (output,) = (await client.get_output_async()).outputs
    assert output.new_token_ids == [9]
    client.cancel(["r", "one-that-has-ended"])
    assert not client.dp_engines_running()
    cluster.check_complete()
    ended = cluster.registry.get_sample_value("pdserve_requests_total", {"end": "abort"})
    assert ended == 1


async def test_the_front_end_forgets_one_whose_adding_was_broken_off() -> None:
    cluster = Cluster()
    odd: Any = request("odd")
    odd.sampling_params = None  # a pooling request: not served
    with pytest.raises(AssertionError):
        await ClusterCoreClient(cluster.core).add_request_async(odd)
    (output,) = cluster.outputs()
    assert (output.request_id, output.finish_reason) == ("odd", FinishReason.ABORT)
    cluster.check_complete()


async def test_an_answer_that_ends_by_a_stop_string_counts_as_one() -> None:
    """vLLM's front end finds the string and has the engine stop."""
    cluster = Cluster()
    client = ClusterCoreClient(cluster.core)
    (p,), (d,) = cluster.prefill, cluster.decode
    await client.add_request_async(request(max_tokens=500))
    step(p, prefilled())
    for token in range(5):
        step(d, decoded(token))
    await client.abort_requests_async(["r"])
    assert end_of(d).told(Kind.ABORT) == ["r"]
    cluster.check_complete()
    ended = cluster.registry.get_sample_value
    assert ended("pdserve_requests_total", {"end": "stop"}) == 1
    counts = cluster.core.scaling_report().counts
    assert (counts.ended, counts.output_tokens) == (1, 6)


def test_a_stopped_router_closes_its_connections() -> None:
    cluster = Cluster()
    ClusterCoreClient(cluster.core).shutdown()
    for replica in (*cluster.prefill, *cluster.decode):
        assert end_of(replica).closed_because == "the router was stopped"


def imported(module: str) -> set[str]:
    """What a module of the router imports, and what those of the router import that it does."""
    waiting, found = [module], set[str]()
    while waiting:
        path = ROUTER.parent / f"{waiting.pop().replace('.', '/')}.py"
        names = {
            node.module or ""
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
        }
        waiting += [name for name in names - found if name.startswith("router.")]
        found |= names
    return found


def test_it_is_an_adapter() -> None:
    """Small, without a middleware in sight, and nothing in it can be set from outside."""
    source = (ROUTER / "core_client.py").read_text()
    assert len(source.splitlines()) <= 250
    names = imported("router.core_client")
    assert "router.lifecycle" in names
    assert not {name for name in names if name.startswith(("starlette", "fastapi"))}
    assert vars(ClusterCoreClient(Cluster().core)).keys() == {"_core"}
