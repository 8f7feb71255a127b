"""The core client carries out what the plans say: affinity, local prefill, admission, deadlines."""

import asyncio
import time
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import pytest
from fake_replicas import decoded, end_of, join, prefilled, request, step
from prometheus_client import CollectorRegistry
from vllm.v1.engine import EngineCoreRequest, FinishReason
from vllm.v1.metrics.stats import PrefillStats

from engine.step_limit import STEP_LIMIT
from engine.steps import StepSample
from engine.wire import Kind, LoadReport, StepOutputs
from router.admit import AdmissionLimits
from router.answers import NOTE, RouteNote
from router.core_client import ClusterCoreClient
from router.metrics import RouterMetrics
from router.policies import POLICIES
from router.recovery import RecoveryLimits
from router.settings import Targets
from router.traffic import TrafficMeter

BLOCK = 64
LIMITS = RecoveryLimits(max_moves=3, max_wait_s=120.0, stall_timeout_s=10.0)


class Cluster:
    """A core client over fake replicas with caches, two in each pool."""

    def __init__(self, targets: Targets) -> None:
        self.registry = CollectorRegistry()
        traffic = TrafficMeter(ttft_s=1.0, itl_s=1.0)
        self.core = ClusterCoreClient(
            POLICIES["p2c"],
            RouterMetrics(self.registry, traffic),
            LIMITS,
            traffic=traffic,
            targets=targets,
        )
        self.prefill = [
            join(self.core.prefill, f"p{index}", block_size=BLOCK) for index in range(2)
        ]
        self.decode = [join(self.core.decode, f"d{index}", block_size=BLOCK) for index in range(2)]

    def asked(self) -> dict[str, list[str]]:
        """By replica, the requests that it was asked."""
        every = (*self.prefill, *self.decode)
        return {
            replica.replica_id: [asked.request_id for asked in end_of(replica).added()]
            for replica in every
            if end_of(replica).added()
        }

    def count(self, name: str, **labels: str) -> float | None:
        found: float | None = self.registry.get_sample_value(f"pdserve_{name}_total", labels)
        return found


def prompt(
    request_id: str, num_tokens: int, *, first: int = 0, **options: Any
) -> EngineCoreRequest:
    made = request(request_id, **options)
    made.prompt_token_ids = [first, *range(1, num_tokens)]
    return made


@pytest.fixture
def note() -> Iterator[RouteNote]:
    """Of the HTTP request that the test is."""
    note = RouteNote()
    token = NOTE.set(note)
    yield note
    NOTE.reset(token)


async def test_setting_the_time_of_day_makes_no_prompt_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Cluster(Targets())
    sent = prompt("r", 100)
    sent.arrival_time = time.time()
    noon_s = sent.arrival_time + Targets().admission.ttft_s + 60
    monkeypatch.setattr(time, "time", lambda: noon_s)
    await cluster.core.add_request_async(sent)
    (has_it,) = (replica for replica in cluster.prefill if end_of(replica).added())
    step(has_it)
    # It would not be counted as ahead of others if it were to be put back.
    assert has_it.work_s > 0


async def test_a_prompt_goes_where_its_beginning_is_cached() -> None:
    cluster = Cluster(Targets())
    await cluster.core.add_request_async(prompt("a", 4000))
    await cluster.core.add_request_async(prompt("b", 4000, first=1))
    assert cluster.asked() == {"p0": ["a"], "p1": ["b"]}
    for replica, request_id in zip(cluster.prefill, "ab", strict=True):
        step(replica, prefilled(request_id=request_id))
    await cluster.core.add_request_async(prompt("b-again", 4000, first=1))
    await cluster.core.add_request_async(prompt("a-again", 4000))
    asked = cluster.asked()
    assert (asked["p0"], asked["p1"]) == (["a", "a-again"], ["b", "b-again"])
    assert cluster.count("picks", pool="prefill", reason="prefix is cached there") == 2


async def test_a_replica_that_does_not_find_it_cached_is_trusted_less() -> None:
    cluster = Cluster(Targets())
    for request_id in ("a", "a-again"):
        await cluster.core.add_request_async(prompt(request_id, 4000))
        output = prefilled(request_id=request_id)
        output.prefill_stats = PrefillStats()
        output.prefill_stats.set(4000, 0, 0)
        step(cluster.prefill[0], output)
    assert cluster.core.prefill.prefixes.trust == pytest.approx(0.95)


async def test_steps_that_replicas_report_correct_the_costs() -> None:
    cluster = Cluster(Targets())
    before = cluster.core.prefill.cost.prefill.seconds(num_uncached=500, num_tokens=500)
    for number in range(1, 50):
        sample = StepSample(number, 10 * before, 500, 500**2, 0, 0)
        for _ in range(2):  # a step that is reported twice counts once
            cluster.prefill[0].step_received(StepOutputs([], LoadReport(step=sample)))
    after = cluster.core.prefill.cost.prefill.seconds(num_uncached=500, num_tokens=500)
    assert after == pytest.approx(10 * before, rel=0.02)
    assert cluster.core.decode.cost.prefill.seconds(num_uncached=500, num_tokens=500) == before


async def test_prompts_carry_the_time_by_which_they_must_start() -> None:
    cluster = Cluster(Targets())
    for request_id, num_tokens, priority in (
        ("long", 50_000, 0),
        ("short", 50, 0),
        ("vip", 50, -9),
    ):
        made = prompt(request_id, num_tokens)
        made.arrival_time, made.priority = 1000.0, priority
        await cluster.core.add_request_async(made)
    asked = [each for replica in cluster.prefill for each in end_of(replica).added()]
    order = sorted(asked, key=lambda each: int(each.priority))
    assert [each.request_id for each in order] == ["vip", "short", "long"]
    # What the client said is kept for an engine that answers on its own.
    assert cluster.core._requests["vip"].request.priority == -9


async def test_decode_reads_what_it_has_cached_from_the_turn_before(note: RouteNote) -> None:
    cluster = Cluster(Targets(local_prefill=True))
    await cluster.core.add_request_async(prompt("turn-1", 4000, max_tokens=2))
    step(cluster.prefill[0], prefilled(token=7, request_id="turn-1"))
    (decode,) = (each for each in cluster.decode if end_of(each).added())
    step(decode, decoded(8, ends=True, request_id="turn-1"))
    again = prompt("turn-2", 4000)
    again.prompt_token_ids = [*(again.prompt_token_ids or ()), 7, 8, 9]
    await cluster.core.add_request_async(again)
    assert cluster.asked()[decode.replica_id] == ["turn-1", "turn-2"]
    assert note.routes == ["prefill_first;reason=default", "decode_only;reason=cached_in_decode"]
    routed = cluster.count("routes", route="decode_only", reason="cached_in_decode")
    assert routed == 1


@pytest.mark.parametrize("local_prefill", [True, False])
async def test_decode_reads_a_short_prompt_if_it_may(local_prefill: bool) -> None:
    cluster = Cluster(Targets(local_prefill=local_prefill))
    await cluster.core.add_request_async(prompt("r", 10))
    assert list(cluster.asked()) == ["d0" if local_prefill else "p0"]


async def test_prompts_that_come_at_once_do_not_all_stall_decode() -> None:
    """Each would fit into a step of decode's; together they would not, until it has read them."""
    cluster = Cluster(Targets(local_prefill=True, admission=AdmissionLimits(itl_s=0.05)))
    for number in range(40):
        await cluster.core.add_request_async(prompt(f"r{number}", 400, first=number))
    asked = cluster.asked()
    read_by_decode = {key: asked[key] for key in ("d0", "d1")}
    for replica in cluster.decode:
        request_ids = read_by_decode[replica.replica_id]
        assert 1 <= len(request_ids) < 10
        assert 0.02 < replica.reading_s <= 0.05
        for request_id in request_ids:
            step(replica, decoded(7, request_id=request_id))
        assert replica.reading_s == 0
    await cluster.core.add_request_async(prompt("next", 400, first=99))
    assert "next" in {*cluster.asked()["d0"], *cluster.asked()["d1"]}


async def test_decode_reads_in_pieces_what_prefill_would_be_late_with(note: RouteNote) -> None:
    limits = AdmissionLimits(ttft_s=1.0, itl_s=0.05)
    cluster = Cluster(Targets(local_prefill=True, admission=limits))
    for number in range(6):
        await cluster.core.add_request_async(prompt(f"busy-{number}", 14_000, first=number))
    asked = cluster.asked()
    read_in_pieces = [each for replica in cluster.decode for each in end_of(replica).added()]
    assert {*asked} == {"p0", "p1", "d0", "d1"}
    for each in read_in_pieces:
        assert each.sampling_params.extra_args[STEP_LIMIT] == pytest.approx(0.035)
    assert note.routes[0] == "prefill_first;reason=default"
    assert "decode_only;reason=prefill_saturated" in note.routes


async def test_a_client_cannot_say_in_which_pieces_its_prompt_is_read() -> None:
    cluster = Cluster(Targets())
    request = prompt("r", 10)
    request.sampling_params.extra_args = {STEP_LIMIT: 1e-9}
    await cluster.core.add_request_async(request)
    (asked,) = end_of(cluster.prefill[0]).added()
    assert STEP_LIMIT not in asked.sampling_params.extra_args


REFUSES = Targets(admission=AdmissionLimits(ttft_s=0.5, itl_s=0.05, refuses=True))
BOUNDED = Targets(admission=AdmissionLimits(max_queued=2))


async def test_what_would_be_late_is_refused_with_a_status(note: RouteNote) -> None:
    cluster = Cluster(REFUSES)
    for number in range(2):
        await cluster.core.add_request_async(prompt(f"busy-{number}", 8000, first=number))
    assert note.refusal is None
    await cluster.core.add_request_async(prompt("late", 8000, first=5))
    assert note.refusal is not None
    assert note.refusal.status == HTTPStatus.TOO_MANY_REQUESTS
    assert note.refusal.retry_after_s >= 1
    assert sorted(cluster.asked()) == ["p0", "p1"]
    assert cluster.core._requests.keys() == {"busy-0", "busy-1"}
    assert cluster.count("refused", reason="ttft") == 1


async def test_the_queue_is_bounded_and_a_first_token_makes_room(note: RouteNote) -> None:
    cluster = Cluster(BOUNDED)
    for number in range(2):
        await cluster.core.add_request_async(prompt(f"r{number}", 100, first=number))
    await cluster.core.add_request_async(prompt("one-too-many", 100))
    assert note.refusal is not None
    assert note.refusal.status == HTTPStatus.TOO_MANY_REQUESTS
    note.refusal = None
    step(cluster.prefill[0], prefilled(request_id="r0"))
    await cluster.core.add_request_async(prompt("next", 100))
    assert note.refusal is None
    assert "next" in cluster.core._requests


async def test_a_request_that_moves_is_not_refused() -> None:
    cluster = Cluster(Targets(admission=AdmissionLimits(max_queued=1)))
    await cluster.core.add_request_async(prompt("r", 100))
    (lost,) = (each for each in cluster.prefill if end_of(each).added())
    lost.replica_gone("killed")
    (other,) = cluster.core.prefill
    assert [asked.request_id for asked in end_of(other).added()] == ["r~2"]


async def test_a_request_without_a_token_in_time_is_told_to_come_back(note: RouteNote) -> None:
    cluster = Cluster(Targets(queue_timeout_s=0.01))
    await cluster.core.add_request_async(prompt("r", 100))
    outputs = await asyncio.wait_for(cluster.core.get_output_async(), 10)
    assert [output.finish_reason for output in outputs.outputs] == [FinishReason.ERROR]
    assert note.refusal is not None
    assert note.refusal.status == HTTPStatus.SERVICE_UNAVAILABLE
    assert end_of(cluster.prefill[0]).told(Kind.ABORT) == ["r"]
    assert cluster.count("refused", reason="queue_timeout") == 1
    assert not cluster.core._requests


async def test_with_the_first_token_the_deadline_is_over() -> None:
    cluster = Cluster(Targets(queue_timeout_s=0.05))
    await cluster.core.add_request_async(prompt("r", 100))
    step(cluster.prefill[0], prefilled())
    (first,) = (await cluster.core.get_output_async()).outputs
    assert first.new_token_ids == [9]
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(cluster.core.get_output_async(), 0.2)
    assert "r" in cluster.core._requests
