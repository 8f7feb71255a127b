"""The life of a request, with fake replicas: what is asked of whom, and how it ends."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from core_clusters import LIMITS, Cluster, lose
from fake_replicas import KV_OF_PREFILL, add, decoded, end_of, join, prefilled, request, step
from vllm.exceptions import GenerationError
from vllm.v1.engine import EngineCoreOutput, FinishReason

from engine.output_tokens import OUTPUT_TOKENS
from engine.step_limit import STEP_LIMIT
from engine.wire import Kind
from router.admission import AdmissionLimits
from router.route_note import NOTE, RouteNote
from router.settings import RoutingSettings


async def test_first_token_from_prefill_then_decode_continues() -> None:
    cluster = Cluster()
    (p,), (d,) = cluster.prefill, cluster.decode
    add(cluster.core, request())
    (asked,) = end_of(p).added()
    assert asked.prompt_token_ids == [5, 6, 7]
    assert asked.sampling_params is not None
    assert asked.sampling_params.max_tokens == 1
    assert asked.sampling_params.extra_args == {
        "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False}
    }
    step(p, prefilled())
    (first,) = cluster.outputs()
    assert (first.new_token_ids, first.finish_reason, first.kv_transfer_params) == ([9], None, None)
    (asked,) = end_of(d).added()
    assert asked.prompt_token_ids == [5, 6, 7]
    assert asked.sampling_params is not None
    assert asked.sampling_params.max_tokens == 4
    assert asked.sampling_params.extra_args == {
        "kv_transfer_params": KV_OF_PREFILL,
        OUTPUT_TOKENS: [9],
    }
    step(d, decoded(1))
    step(d, decoded(2), decoded(3, ends=True))
    assert [output.new_token_ids for output in cluster.outputs()] == [[1], [2], [3]]
    cluster.check_complete()


async def test_decode_samples_every_token_where_prefill_cannot() -> None:
    cluster = Cluster()
    (d,) = cluster.decode
    p = join(cluster.core.prefill, "p1", block_size=16, num_dropped_tokens=2)
    lose(cluster.prefill[0])
    add(cluster.core, request(seed=3, temperature=1.0, logprobs=2))
    (asked,) = end_of(p).added()
    assert asked.sampling_params is not None
    assert asked.sampling_params.ignore_eos
    assert asked.sampling_params.logprobs is None
    step(p, prefilled())
    assert cluster.outputs() == []
    (asked,) = end_of(d).added()
    assert asked.prompt_token_ids == [5, 6, 7]
    assert asked.sampling_params is not None
    assert (asked.sampling_params.max_tokens, asked.sampling_params.seed) == (4, 3)
    step(d, decoded(1, ends=True))
    assert [output.new_token_ids for output in cluster.outputs()] == [[1]]
    cluster.check_complete()


@pytest.mark.parametrize(
    ("options", "replica", "transfers_kv"),
    [
        pytest.param({"max_tokens": 1}, "p0", False, id="one-token-in-prefill"),
        pytest.param({"prompt_logprobs": 1}, "d0", False, id="prompt-logprobs-in-decode"),
    ],
)
async def test_one_engine_does_it_all(
    options: dict[str, Any], replica: str, transfers_kv: bool
) -> None:
    cluster = Cluster()
    add(cluster.core, request(**options))
    asked = {r.replica_id: end_of(r).added() for r in (*cluster.prefill, *cluster.decode)}
    (only,) = asked.pop(replica)
    assert list(asked.values()) == [[]]
    assert only.sampling_params is not None
    # Beside decode's answers a prompt is read in pieces.
    is_limited = STEP_LIMIT in (only.sampling_params.extra_args or {})
    assert is_limited == (replica == "d0")
    target = next(r for r in (*cluster.prefill, *cluster.decode) if r.replica_id == replica)
    step(target, decoded(1, ends=True))
    assert [output.finish_reason for output in cluster.outputs()] == [FinishReason.LENGTH]
    cluster.check_complete()


async def test_an_answer_that_ends_at_its_first_token_never_reaches_decode() -> None:
    cluster = Cluster()
    (p,), (d,) = cluster.prefill, cluster.decode
    add(cluster.core, request())
    step(p, EngineCoreOutput("r", [1], finish_reason=FinishReason.STOP))
    (output,) = cluster.outputs()
    assert output.finish_reason == FinishReason.STOP
    assert end_of(d).sent == []
    cluster.check_complete()


async def test_abort_while_prefilling_frees_kv_that_comes_late() -> None:
    cluster = Cluster()
    (p,), (d,) = cluster.prefill, cluster.decode
    add(cluster.core, request())
    cluster.core.lifecycle.stop(["r"], FinishReason.STOP)
    assert end_of(p).told(Kind.ABORT) == ["r"]
    step(p, prefilled())  # had left before the abort arrived
    assert end_of(p).told(Kind.RELEASE) == ["r"]
    assert end_of(d).sent == []
    assert cluster.outputs() == []
    cluster.check_complete()


async def test_abort_after_the_transfer_began_goes_to_decode_alone() -> None:
    cluster = Cluster()
    (p,), (d,) = cluster.prefill, cluster.decode
    add(cluster.core, request())
    step(p, prefilled())
    cluster.core.lifecycle.stop(["r"], FinishReason.STOP)
    assert end_of(d).told(Kind.ABORT) == ["r"]
    assert end_of(p).told(Kind.RELEASE) == []
    cluster.check_complete()


async def test_without_prefill_decode_does_it_all() -> None:
    cluster = Cluster()
    lose(cluster.prefill[0])
    add(cluster.core, request())
    (asked,) = end_of(cluster.decode[0]).added()
    assert not (asked.sampling_params and asked.sampling_params.extra_args)


async def test_without_decode_a_request_waits_for_one() -> None:
    cluster = Cluster()
    (p,), (d,) = cluster.prefill, cluster.decode
    lose(d)
    add(cluster.core, request())
    assert end_of(p).added() == []
    cluster.decode = [cluster.join(cluster.core.decode, "new")]
    step(p, prefilled())
    step(cluster.decode[0], decoded(1, ends=True))
    assert [output.new_token_ids for output in cluster.outputs()] == [[9], [1]]
    cluster.check_complete()


async def test_those_that_wait_for_a_replica_are_a_queue_as_well() -> None:
    cluster = Cluster(settings=RoutingSettings(admission=AdmissionLimits(max_queued=2)))
    lose(cluster.decode[0])
    for request_id in ("a", "b", "c"):
        add(cluster.core, request(request_id))
    (output,) = cluster.outputs()
    assert (output.request_id, output.finish_reason) == ("c", FinishReason.ERROR)
    cluster.decode = [cluster.join(cluster.core.decode, "new")]
    assert {asked.request_id for asked in end_of(cluster.prefill[0]).added()} == {"a", "b"}


async def test_a_wait_has_an_end() -> None:
    cluster = Cluster(limits=replace(LIMITS, max_wait_s=0.01))
    lose(cluster.decode[0])
    add(cluster.core, request())
    async with asyncio.timeout(10):
        outputs = (await cluster.core.outputs.get()).outputs
    assert [output.finish_reason for output in outputs] == [FinishReason.ERROR]
    cluster.check_complete()


async def test_a_request_that_waits_can_be_aborted() -> None:
    cluster = Cluster(limits=replace(LIMITS, max_wait_s=0.01))
    lose(cluster.decode[0])
    add(cluster.core, request())
    cluster.core.lifecycle.stop(["r"], FinishReason.STOP)
    await asyncio.sleep(0.05)
    assert cluster.outputs() == []
    cluster.check_complete()


@pytest.mark.parametrize("pool", ["prefill", "decode"])
async def test_an_engine_that_fails_with_a_request_gives_its_answer_a_status(pool: str) -> None:
    cluster, note = Cluster(), RouteNote()
    NOTE.set(note)
    options: dict[str, Any] = {"prompt_logprobs": 1} if pool == "decode" else {}
    add(cluster.core, request(**options))
    (replica,) = cluster.prefill if pool == "prefill" else cluster.decode
    step(replica, EngineCoreOutput("r", [], finish_reason=FinishReason.ERROR))
    assert isinstance(note.error, GenerationError)
    (output,) = cluster.outputs()
    assert output.finish_reason == FinishReason.ERROR
    cluster.check_complete()


async def test_metrics_have_the_cost_model_of_each_pool() -> None:
    cluster = Cluster()
    cost = cluster.core.decode.cost
    for term, seconds in (
        ("prompt_token", cost.prefill.per_token_s),
        ("step", cost.decode.base_s),
        ("context_token", cost.decode.per_context_token_s),
    ):
        labels = {"pool": "decode", "term": term}
        assert cluster.registry.get_sample_value("pdserve_cost_seconds", labels) == seconds


async def test_metrics_tell_ttft_itl_and_transfer_apart() -> None:
    cluster = Cluster()
    (p,), (d,) = cluster.prefill, cluster.decode
    add(cluster.core, request())
    step(p, prefilled())
    for token in (1, 2):
        step(d, decoded(token))
    step(d, decoded(3, ends=True))
    counts = {
        name: cluster.registry.get_sample_value(f"pdserve_{name}_seconds_count")
        for name in ("ttft", "itl", "handover")
    }
    assert counts == {"ttft": 1, "itl": 3, "handover": 1}
    assert cluster.registry.get_sample_value("pdserve_output_tokens_total") == 4
    assert cluster.registry.get_sample_value("pdserve_requests_total", {"end": "length"}) == 1
