"""The life of a request, with fake replicas: what is asked of whom, and how it ends."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

from engine.wire import AddRequest, Kind, LoadReport, Rejection, StepOutputs
from router.core_client import ClusterCoreClient
from router.errors import NoReplica
from router.metrics import PoolMetrics, RouterMetrics
from router.policies import POLICIES
from router.pool import Pool, Replica

HANDED_OVER = {"remote_block_ids": [[1, 2]], "remote_engine_id": "p"}


@dataclass
class FakeEnd:
    """Records what the router sends to a replica."""

    sent: list[tuple[Kind, Any]] = field(default_factory=list)

    def send(self, kind: Kind, message: object) -> None:
        self.sent.append((kind, message))

    def close(self, reason: str) -> None:
        pass

    def added(self) -> list[EngineCoreRequest]:
        return [m.request for _, m in self.sent if isinstance(m, AddRequest)]

    def told(self, kind: Kind) -> list[str]:
        return [request_id for sent, ids in self.sent if sent is kind for request_id in ids]


class Cluster:
    """A core client over fake replicas, `num` in each pool."""

    def __init__(self, num: int = 1) -> None:
        self.registry = CollectorRegistry()
        self.core = ClusterCoreClient(POLICIES["round_robin"], RouterMetrics(self.registry))
        PoolMetrics((self.core.prefill, self.core.decode), self.registry)
        self.prefill = [self._join(self.core.prefill, f"p{index}") for index in range(num)]
        self.decode = [self._join(self.core.decode, f"d{index}") for index in range(num)]

    def _join(self, pool: Pool, replica_id: str) -> Replica:
        replica = Replica(replica_id, pool, on_gone=lambda _: None)
        replica.end = FakeEnd()  # type: ignore[assignment]
        pool.insert(replica)
        return replica

    def outputs(self) -> list[EngineCoreOutput]:
        """What the front end has been given since the last call."""
        queue, outputs = self.core._outputs, []
        while not queue.empty():
            outputs += queue.get_nowait().outputs
        return outputs

    def check_settled(self) -> None:
        """Nothing is left anywhere: no request, no line in a ledger, no gauge above zero."""
        assert self.core._requests == {}
        for replica in (*self.prefill, *self.decode):
            assert (replica.sent, replica.sent_work_s) == ({}, 0.0)
        for phase in ("prefilling", "transferring", "decoding"):
            inflight = self.registry.get_sample_value("pdserve_inflight", {"phase": phase})
            assert not inflight


def end_of(replica: Replica) -> FakeEnd:
    assert isinstance(replica.end, FakeEnd)
    return replica.end


def request(request_id: str = "r", **options: Any) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=[5, 6, 7],
        mm_features=None,
        sampling_params=SamplingParams(**{"max_tokens": 4, "temperature": 0.0, **options}),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def step(replica: Replica, *outputs: EngineCoreOutput) -> None:
    replica.step_received(StepOutputs(list(outputs), LoadReport()))


def prefilled(token: int = 9, request_id: str = "r") -> EngineCoreOutput:
    return EngineCoreOutput(
        request_id,
        [token],
        finish_reason=FinishReason.LENGTH,
        kv_transfer_params=dict(HANDED_OVER),
    )


def decoded(token: int, *, ends: bool = False) -> EngineCoreOutput:
    reason = FinishReason.LENGTH if ends else None
    return EngineCoreOutput("r", [token], finish_reason=reason)


async def test_first_token_from_prefill_then_decode_continues() -> None:
    cluster = Cluster()
    (p,), (d,) = cluster.prefill, cluster.decode
    await cluster.core.add_request_async(request())
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
    assert asked.prompt_token_ids == [5, 6, 7, 9]
    assert asked.sampling_params is not None
    assert asked.sampling_params.max_tokens == 3
    assert asked.sampling_params.extra_args == {"kv_transfer_params": HANDED_OVER}
    step(d, decoded(1))
    step(d, decoded(2), decoded(3, ends=True))
    assert [output.new_token_ids for output in cluster.outputs()] == [[1], [2], [3]]
    cluster.check_settled()


async def test_decode_samples_every_token_where_state_begins_with_the_first() -> None:
    cluster = Cluster()
    (p,), (d,) = cluster.prefill, cluster.decode
    await cluster.core.add_request_async(request(seed=3, temperature=1.0, logprobs=2))
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
    cluster.check_settled()


@pytest.mark.parametrize(
    ("options", "replica", "hands_over"),
    [
        pytest.param({"max_tokens": 1}, "p0", False, id="one-token-in-prefill"),
        pytest.param({"prompt_logprobs": 1}, "d0", False, id="prompt-logprobs-in-decode"),
    ],
)
async def test_one_engine_does_it_all(
    options: dict[str, Any], replica: str, hands_over: bool
) -> None:
    cluster = Cluster()
    await cluster.core.add_request_async(request(**options))
    asked = {r.replica_id: end_of(r).added() for r in (*cluster.prefill, *cluster.decode)}
    (only,) = asked.pop(replica)
    assert list(asked.values()) == [[]]
    assert only.sampling_params is not None
    assert not only.sampling_params.extra_args
    target = next(r for r in (*cluster.prefill, *cluster.decode) if r.replica_id == replica)
    step(target, decoded(1, ends=True))
    assert [output.finish_reason for output in cluster.outputs()] == [FinishReason.LENGTH]
    cluster.check_settled()


async def test_an_answer_that_ends_at_its_first_token_never_reaches_decode() -> None:
    cluster = Cluster()
    (p,), (d,) = cluster.prefill, cluster.decode
    await cluster.core.add_request_async(request())
    step(p, EngineCoreOutput("r", [1], finish_reason=FinishReason.STOP))
    (output,) = cluster.outputs()
    assert output.finish_reason == FinishReason.STOP
    assert end_of(d).sent == []
    cluster.check_settled()


async def test_a_client_cannot_say_where_kv_comes_from() -> None:
    cluster = Cluster()
    mine = {"kv_transfer_params": {"do_remote_prefill": True, "remote_host": "10.0.0.1"}}
    await cluster.core.add_request_async(request(extra_args=mine, prompt_logprobs=1))
    (asked,) = end_of(cluster.decode[0]).added()
    assert asked.sampling_params is not None
    assert not asked.sampling_params.extra_args


async def test_abort_while_prefilling_frees_what_is_handed_over_late() -> None:
    cluster = Cluster()
    (p,), (d,) = cluster.prefill, cluster.decode
    await cluster.core.add_request_async(request())
    await cluster.core.abort_requests_async(["r"])
    assert end_of(p).told(Kind.ABORT) == ["r"]
    step(p, prefilled())  # had left before the abort arrived
    assert end_of(p).told(Kind.RELEASE) == ["r"]
    assert end_of(d).sent == []
    assert cluster.outputs() == []
    cluster.check_settled()


async def test_abort_after_handover_goes_to_decode_alone() -> None:
    cluster = Cluster()
    (p,), (d,) = cluster.prefill, cluster.decode
    await cluster.core.add_request_async(request())
    step(p, prefilled())
    await cluster.core.abort_requests_async(["r"])
    assert end_of(d).told(Kind.ABORT) == ["r"]
    assert end_of(p).told(Kind.RELEASE) == []
    cluster.check_settled()


async def test_a_lost_prefill_replica_ends_its_requests_and_no_others() -> None:
    cluster = Cluster(num=2)
    for request_id in ("a", "b"):
        await cluster.core.add_request_async(request(request_id))
    lost, other = cluster.prefill
    lost.replica_gone("killed")
    (output,) = cluster.outputs()
    assert (output.request_id, output.finish_reason) == ("a", FinishReason.ERROR)
    lost.sent.clear()
    lost.sent_work_s = 0.0
    step(other, EngineCoreOutput("b", [1], finish_reason=FinishReason.STOP))
    assert [output.request_id for output in cluster.outputs()] == ["b"]
    cluster.check_settled()


async def test_a_lost_decode_replica_frees_what_prefill_keeps_for_it() -> None:
    cluster = Cluster()
    (p,), (d,) = cluster.prefill, cluster.decode
    await cluster.core.add_request_async(request())
    step(p, prefilled())
    cluster.outputs()
    d.replica_gone("killed")
    (output,) = cluster.outputs()
    assert output.finish_reason == FinishReason.ERROR
    assert end_of(p).told(Kind.RELEASE) == ["r"]


async def test_no_decode_replica_at_handover_is_the_requests_error() -> None:
    cluster = Cluster()
    (p,), (d,) = cluster.prefill, cluster.decode
    await cluster.core.add_request_async(request())
    d.replica_gone("killed")
    step(p, prefilled())
    outputs = cluster.outputs()
    assert [output.new_token_ids for output in outputs] == [[9], []]
    assert outputs[-1].finish_reason == FinishReason.ERROR
    assert end_of(p).told(Kind.RELEASE) == ["r"]


@pytest.mark.parametrize("pool", ["prefill", "decode"])
async def test_without_a_live_replica_a_request_is_refused(pool: str) -> None:
    cluster = Cluster()
    getattr(cluster, pool)[0].replica_gone("killed")
    with pytest.raises(NoReplica, match=pool):
        await cluster.core.add_request_async(request())
    assert cluster.core._requests == {}


async def test_a_leaving_replica_gets_nothing_new_but_finishes() -> None:
    cluster = Cluster(num=2)
    await cluster.core.add_request_async(request("r"))
    leaving, staying = cluster.prefill
    leaving.is_leaving = True
    for index in range(3):
        await cluster.core.add_request_async(request(f"late-{index}"))
    assert len(end_of(leaving).added()) == 1
    assert len(end_of(staying).added()) == 3
    step(leaving, prefilled())
    assert [output.new_token_ids for output in cluster.outputs()] == [[9]]


async def test_a_rejected_request_ends_in_an_error() -> None:
    cluster = Cluster()
    await cluster.core.add_request_async(request())
    cluster.prefill[0].rejected(Rejection("r", "too odd"))
    (output,) = cluster.outputs()
    assert output.finish_reason == FinishReason.ERROR
    cluster.check_settled()


async def test_metrics_tell_ttft_itl_and_handover_apart() -> None:
    cluster = Cluster()
    (p,), (d,) = cluster.prefill, cluster.decode
    await cluster.core.add_request_async(request())
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
