"""The life of a request, with fake replicas: what is asked of whom, and how it ends."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
import torch
from core_clusters import LIMITS, Cluster, fail, hang, lose
from fake_replicas import HANDED_OVER, decoded, end_of, join, prefilled, request, step
from vllm.exceptions import GenerationError
from vllm.v1.engine import EngineCoreOutput, FinishReason

from engine.output_tokens import OUTPUT_TOKENS
from engine.step_limit import STEP_LIMIT
from engine.wire import Kind, LoadReport, Rejection, StepOutputs
from router.admit import AdmissionLimits
from router.answers import NOTE, RouteNote
from router.audit import audit
from router.phases import RequestPhase
from router.pool import Replica
from router.recovery import IN_FLIGHT_TOKENS, Failures, one_more
from router.request import KV_PARAMS, RequestState
from router.settings import Targets


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
    assert asked.prompt_token_ids == [5, 6, 7]
    assert asked.sampling_params is not None
    assert asked.sampling_params.max_tokens == 4
    assert asked.sampling_params.extra_args == {
        "kv_transfer_params": HANDED_OVER,
        OUTPUT_TOKENS: [9],
    }
    step(d, decoded(1))
    step(d, decoded(2), decoded(3, ends=True))
    assert [output.new_token_ids for output in cluster.outputs()] == [[1], [2], [3]]
    cluster.check_settled()


async def test_decode_samples_every_token_where_prefill_cannot() -> None:
    cluster = Cluster()
    (d,) = cluster.decode
    p = join(cluster.core.prefill, "p1", block_size=16, num_dropped_tokens=2)
    lose(cluster.prefill[0])
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
    # Beside decode's answers a prompt is read in pieces.
    is_limited = STEP_LIMIT in (only.sampling_params.extra_args or {})
    assert is_limited == (replica == "d0")
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


async def test_a_client_cannot_say_where_kv_and_tokens_come_from() -> None:
    cluster = Cluster()
    mine = {
        "kv_transfer_params": {"do_remote_prefill": True, "remote_host": "10.0.0.1"},
        OUTPUT_TOKENS: [1, 2],
    }
    await cluster.core.add_request_async(request(extra_args=mine, prompt_logprobs=1))
    (asked,) = end_of(cluster.decode[0]).added()
    assert asked.sampling_params is not None
    assert list(asked.sampling_params.extra_args or {}) == [STEP_LIMIT]


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


def moves(cluster: Cluster, cause: str) -> float | None:
    moved: float | None
    moved = cluster.registry.get_sample_value("pdserve_moves_total", {"cause": cause})
    return moved


async def test_prefill_dies_and_its_requests_are_prefilled_elsewhere() -> None:
    cluster = Cluster(num=2)
    for request_id in ("a", "b"):
        await cluster.core.add_request_async(request(request_id))
    lost, other = cluster.prefill
    lose(lost)
    assert cluster.outputs() == []
    assert [asked.request_id for asked in end_of(other).added()] == ["b", "a~2"]
    assert moves(cluster, "prefill_connection_lost") == 1
    step(other, EngineCoreOutput("b", [1], finish_reason=FinishReason.STOP))
    step(other, EngineCoreOutput("a~2", [2], finish_reason=FinishReason.STOP))
    assert [output.request_id for output in cluster.outputs()] == ["b", "a"]
    cluster.check_settled()


async def test_prefill_dies_before_decode_has_its_blocks() -> None:
    """Decode may wait for them for long, so it is told to forget the request."""
    cluster = Cluster(num=2)
    await cluster.core.add_request_async(request())
    step(cluster.prefill[0], prefilled())
    decode = next(d for d in cluster.decode if end_of(d).added())
    lose(cluster.prefill[0])
    assert end_of(decode).told(Kind.ABORT) == ["r"]
    (asked,) = end_of(cluster.prefill[1]).added()
    assert asked.request_id == "r~2"
    assert asked.sampling_params is not None
    assert asked.sampling_params.max_tokens == 2
    assert (asked.sampling_params.extra_args or {})[OUTPUT_TOKENS] == [9]
    step(decode, decoded(1))  # had left before the abort arrived
    assert [output.new_token_ids for output in cluster.outputs()] == [[9]]


async def test_prefill_dies_once_decode_has_its_blocks_and_nobody_cares() -> None:
    cluster = Cluster(num=2)
    await cluster.core.add_request_async(request())
    step(cluster.prefill[0], prefilled())
    decode = next(d for d in cluster.decode if end_of(d).added())
    step(decode, decoded(1))
    lose(cluster.prefill[0])
    step(decode, decoded(2, ends=True))
    assert [output.new_token_ids for output in cluster.outputs()] == [[9], [1], [2]]
    cluster.check_settled()


@pytest.mark.parametrize("streamed", [0, 1], ids=["before-its-first-token", "mid-stream"])
async def test_decode_dies_and_the_answer_goes_on_elsewhere(streamed: int) -> None:
    cluster = Cluster(num=2)
    p = cluster.prefill
    await cluster.core.add_request_async(request())
    step(p[0], prefilled())
    lost = next(d for d in cluster.decode if end_of(d).added())
    other = next(d for d in cluster.decode if d is not lost)
    for token in range(streamed):
        step(lost, decoded(token))
    lose(lost)
    assert end_of(p[0]).told(Kind.RELEASE) == ([] if streamed else ["r"])
    asked = [asked for each in p for asked in end_of(each).added()][-1]
    again = next(each for each in p if asked in end_of(each).added())
    assert asked.sampling_params is not None
    assert asked.sampling_params.max_tokens == streamed + 2
    step(again, prefilled(token=5, request_id="r~2"))
    (asked,) = end_of(other).added()
    assert asked.sampling_params is not None
    assert (asked.sampling_params.extra_args or {})[OUTPUT_TOKENS] == [9, *range(streamed), 5]
    assert asked.sampling_params.max_tokens == 4
    step(other, decoded(6, ends=True, request_id="r~2"))
    tokens = [token for output in cluster.outputs() for token in output.new_token_ids]
    assert tokens == [9, *range(streamed), 5, 6]
    assert cluster.registry.get_sample_value("pdserve_recovery_seconds_count") == 1
    cluster.check_settled()


async def test_the_last_token_of_a_moved_answer_needs_no_decode() -> None:
    cluster = Cluster(num=2)
    await cluster.core.add_request_async(request(max_tokens=2))
    step(cluster.prefill[0], prefilled())
    lose(next(d for d in cluster.decode if end_of(d).added()))
    asked = [asked for each in cluster.prefill for asked in end_of(each).added()][-1]
    assert asked.sampling_params is not None
    assert KV_PARAMS not in (asked.sampling_params.extra_args or {})


async def test_prompt_logprobs_come_once() -> None:
    cluster = Cluster(num=2)
    await cluster.core.add_request_async(request(prompt_logprobs=1))
    lost = next(d for d in cluster.decode if end_of(d).added())
    step(lost, decoded(1))
    lose(lost)
    asked = end_of(cluster.prefill[0]).added()[-1]
    step(cluster.prefill[0], prefilled(request_id=asked.request_id))
    other = next(d for d in cluster.decode if d is not lost)
    (asked,) = end_of(other).added()
    assert asked.sampling_params is not None
    assert asked.sampling_params.prompt_logprobs is None


async def test_without_prefill_decode_does_it_all() -> None:
    cluster = Cluster()
    lose(cluster.prefill[0])
    await cluster.core.add_request_async(request())
    (asked,) = end_of(cluster.decode[0]).added()
    assert not (asked.sampling_params and asked.sampling_params.extra_args)


async def test_without_decode_a_request_waits_for_one() -> None:
    cluster = Cluster()
    (p,), (d,) = cluster.prefill, cluster.decode
    lose(d)
    await cluster.core.add_request_async(request())
    assert end_of(p).added() == []
    cluster.decode = [cluster.join(cluster.core.decode, "new")]
    step(p, prefilled())
    step(cluster.decode[0], decoded(1, ends=True))
    assert [output.new_token_ids for output in cluster.outputs()] == [[9], [1]]
    cluster.check_settled()


async def test_those_that_wait_for_a_replica_are_a_queue_as_well() -> None:
    cluster = Cluster(targets=Targets(admission=AdmissionLimits(max_queued=2)))
    lose(cluster.decode[0])
    for request_id in ("a", "b", "c"):
        await cluster.core.add_request_async(request(request_id))
    (output,) = cluster.outputs()
    assert (output.request_id, output.finish_reason) == ("c", FinishReason.ERROR)
    cluster.decode = [cluster.join(cluster.core.decode, "new")]
    assert {asked.request_id for asked in end_of(cluster.prefill[0]).added()} == {"a", "b"}


async def test_decode_dies_while_prefill_works_and_the_answer_waits() -> None:
    cluster = Cluster()
    (p,), (d,) = cluster.prefill, cluster.decode
    await cluster.core.add_request_async(request())
    lose(d)
    step(p, prefilled())
    assert end_of(p).told(Kind.RELEASE) == ["r"]
    assert [output.new_token_ids for output in cluster.outputs()] == [[9]]
    cluster.join(cluster.core.decode, "new")
    assert [asked.request_id for asked in end_of(p).added()] == ["r", "r~2"]


async def test_a_wait_has_an_end() -> None:
    cluster = Cluster(limits=replace(LIMITS, max_wait_s=0.01))
    lose(cluster.decode[0])
    await cluster.core.add_request_async(request())
    async with asyncio.timeout(10):
        outputs = (await cluster.core.get_output_async()).outputs
    assert [output.finish_reason for output in outputs] == [FinishReason.ERROR]
    cluster.check_settled()


async def test_a_request_that_waits_can_be_aborted() -> None:
    cluster = Cluster(limits=replace(LIMITS, max_wait_s=0.01))
    lose(cluster.decode[0])
    await cluster.core.add_request_async(request())
    await cluster.core.abort_requests_async(["r"])
    await asyncio.sleep(0.05)
    assert cluster.outputs() == []
    cluster.check_settled()


async def test_moves_are_bounded() -> None:
    cluster = Cluster(num=3, limits=replace(LIMITS, max_moves=1))
    await cluster.core.add_request_async(request())
    for turn, prefill in enumerate(cluster.prefill[:2]):
        (asked,) = end_of(prefill).added()
        step(prefill, prefilled(request_id=asked.request_id))
        fail(next(d for d in cluster.core.decode if end_of(d).added()))
        assert len(cluster.core._requests) == 1 - turn
    assert cluster.outputs()[-1].finish_reason == FinishReason.ERROR


@pytest.mark.parametrize("gets_tokens", [False, True])
async def test_lost_connections_count_only_where_nothing_comes_between_them(
    gets_tokens: bool,
) -> None:
    cluster = Cluster(num=4, limits=replace(LIMITS, max_moves=1))
    await cluster.core.add_request_async(request(max_tokens=100))
    for _ in range(3):
        if not (state := cluster.core._requests.get("r")):
            break
        if gets_tokens:
            lose(get_tokens(cluster, 2, "r"))
        else:
            assert state.prefill is not None
            lose(state.prefill)
    assert ("r" in cluster.core._requests) is gets_tokens


async def test_suspects_that_a_new_replica_wakes_are_each_sent_once() -> None:
    cluster = Cluster()
    for request_id in ("a", "b", "c"):
        await cluster.core.add_request_async(request(request_id, max_tokens=100))
    for request_id in ("c", "a", "b"):
        # In another order than they came in.
        cluster.core._requests[request_id].failures = TWICE
        cluster.core._quarantine.wait(cluster.core._requests[request_id])
    lose(cluster.prefill[0])
    lose(cluster.decode[0])
    new = cluster.join(cluster.core.decode, "new")
    cluster.decode = [new]
    (asked,) = end_of(new).added()
    holdings = cluster.core.holdings(frozenset("abc"))
    assert audit(holdings, holdings, {}).disagreements == ()
    assert len(cluster.core._quarantine.waiting) == 2
    new.rejected(Rejection(asked.request_id, "another suspect is here", has_suspect=True))
    assert len(end_of(new).added()) == 1, "it says itself when it may have one"


async def test_a_request_that_makes_every_engine_fail_is_refused_with_the_third() -> None:
    cluster = Cluster(num=4)
    await cluster.core.add_request_async(request())
    for _ in range(2):
        fail(next(each for each in cluster.core.prefill if end_of(each).added()))
    suspect = cluster.core._requests["r"]
    assert (suspect.plan.route.name, suspect.plan.reason) == ("DECODE_ONLY", "suspect")
    assert cluster.outputs() == []
    fail(next(each for each in cluster.core.decode if end_of(each).added()))
    (output,) = cluster.outputs()
    assert output.finish_reason == FinishReason.ERROR
    assert (len(cluster.core.prefill.ledger), len(cluster.core.decode.ledger)) == (2, 3)
    cluster.check_settled()


async def test_after_one_failure_all_go_on_at_once() -> None:
    cluster = Cluster(num=3)
    for index in range(9):
        await cluster.core.add_request_async(request(f"r{index}"))
    lost, *others = cluster.prefill
    had = [asked.request_id for asked in end_of(lost).added()]
    fail(lost)
    moved = [asked.request_id for each in others for asked in end_of(each).added()]
    assert {f"{request_id}~2" for request_id in had} <= set(moved)
    assert not any(state.is_suspect for state in cluster.core._requests.values())


TWICE = Failures(num_ended=2, num_tokens=0, was_prefilling=False)


async def test_suspects_run_each_in_a_replica_without_another() -> None:
    cluster = Cluster(num=2)
    for request_id in ("a", "b", "c"):
        await cluster.core.add_request_async(request(request_id, max_tokens=100))
        cluster.core._requests[request_id].failures = TWICE
    for replica in cluster.prefill:
        lose(replica)
    tried = [end_of(each).added() for each in cluster.decode]
    assert [len(asked) for asked in tried] == [1, 1]
    assert all(
        message.is_suspect
        for each in cluster.decode
        for kind, message in end_of(each).sent
        if kind is Kind.ADD
    )
    (waits,) = cluster.core._quarantine.waiting
    first, second = (asked[0].request_id for asked in tried)
    # Past the place where engines have failed it is cleared, and the next one may go there.
    for token in range(IN_FLIGHT_TOKENS + 1):
        step(cluster.decode[0], decoded(token, request_id=first))
    assert end_of(cluster.decode[0]).told(Kind.CLEAR) == [first]
    assert end_of(cluster.decode[0]).added()[-1].request_id == waits.engine_request_id
    # The other one is what makes engines fail.
    fail(cluster.decode[1])
    failed = [each for each in cluster.outputs() if each.finish_reason == FinishReason.ERROR]
    assert [each.request_id for each in failed] == [second.partition("~")[0]]


async def test_a_suspect_stays_away_from_another_routers() -> None:
    cluster = Cluster(num=2)
    await cluster.core.add_request_async(request(max_tokens=100))
    suspect = cluster.core._requests["r"]
    suspect.failures = TWICE
    for each in cluster.decode:
        each.step_received(StepOutputs([], LoadReport(has_suspect=True)))
    for each in cluster.prefill:
        lose(each)
    assert suspect.phase is RequestPhase.WAITING
    other, free = cluster.decode
    free.step_received(StepOutputs([], LoadReport()))
    (asked,) = end_of(free).added()
    # The other router was there first after all.
    free.step_received(StepOutputs([], LoadReport(has_suspect=True)))
    free.rejected(Rejection(asked.request_id, "another suspect is here", has_suspect=True))
    assert suspect.phase is RequestPhase.WAITING
    assert cluster.outputs() == []
    other.step_received(StepOutputs([], LoadReport()))
    (asked,) = end_of(other).added()
    step(other, decoded(1, ends=True, request_id=asked.request_id))
    cluster.check_settled()


@pytest.mark.parametrize(
    ("other_after_s", "is_refused"), [(-2, False), (2, False), (-15, True), (15, True)]
)
async def test_who_is_hung_with_others_is_not_refused(
    other_after_s: float, is_refused: bool
) -> None:
    """Engines hang with it three times, and others that it is not in shortly before or after, as
    on machines that are paused; or at another time, as where it is what hangs them."""
    seen_s = iter(
        each
        for number in range(3)
        for each in sorted((60.0 * number, 60.0 * number + other_after_s))
    )
    cluster = Cluster(num=0, clock=lambda: next(seen_s))
    prefill = cluster.join(cluster.core.prefill, "p")
    await cluster.core.add_request_async(request(max_tokens=100))
    state = cluster.core._requests["r"]
    for number in range(3):
        decodes = [cluster.join(cluster.core.decode, f"d{number}{which}") for which in "ab"]
        if state.phase is RequestPhase.PREFILLING:
            step(prefill, prefilled(request_id=state.engine_request_id))
        decodes.sort(key=lambda each: (each is state.decode) is (other_after_s < 0))
        for each in decodes:
            hang(each)
    reasons = {output.finish_reason for output in cluster.outputs()}
    assert reasons == ({None, FinishReason.ERROR} if is_refused else {None})


async def test_what_was_computed_elsewhere_has_not_made_an_engine_fail() -> None:
    """A prefill fails and a decode after it, soon after its prompt was computed: by chance."""
    cluster = Cluster(num=3)
    await cluster.core.add_request_async(request(max_tokens=100))
    fail(next(each for each in cluster.prefill if has(each, "r")))
    fail(get_tokens(cluster, 2, "r"))
    assert cluster.core._requests["r"].failures == one_more(
        None, num_tokens=2, was_prefilling=False
    )
    assert [output.finish_reason for output in cluster.outputs()] == [None, None]


def has(replica: Replica, request_id: str) -> bool:
    return any(added.request_id == request_id for added in end_of(replica).added())


def get_tokens(cluster: Cluster, num: int, request_id: str) -> Replica:
    """Prefill and decode bring a request so many tokens; returns the decode replica."""
    attempt = cluster.core._requests[request_id].engine_request_id
    prefill, *_ = (each for each in cluster.prefill if has(each, attempt))
    step(prefill, prefilled(request_id=attempt))
    decode, *_ = (each for each in cluster.decode if has(each, attempt))
    for token in range(num - 1):
        step(decode, decoded(token, request_id=attempt))
    return decode


@pytest.mark.parametrize(
    ("num_tokens", "is_suspect"),
    [
        pytest.param(1, True, id="at-the-same-place"),
        pytest.param(IN_FLIGHT_TOKENS, True, id="what-was-in-flight-is-no-progress"),
        pytest.param(IN_FLIGHT_TOKENS + 1, False, id="past-the-place"),
    ],
)
async def test_a_request_that_has_tokens_from_the_engines_that_fail_with_it(
    num_tokens: int, is_suspect: bool
) -> None:
    cluster = Cluster(num=3)
    await cluster.core.add_request_async(request(max_tokens=100))
    for num in (5, num_tokens):
        fail(get_tokens(cluster, num, "r"))
    assert cluster.core._requests["r"].is_suspect is is_suspect
    assert len(cluster.core.decode.ledger) == 1


async def test_a_suspect_that_needs_one_token_more_waits_for_a_decode_replica_with_an_end() -> None:
    """Another request with one token to come would go to prefill alone."""
    cluster = Cluster(limits=replace(LIMITS, max_wait_s=0.01))
    await cluster.core.add_request_async(request(max_tokens=1))
    cluster.core._requests["r"].failures = TWICE
    lose(cluster.decode[0])
    lose(cluster.prefill[0])
    async with asyncio.timeout(10):
        (ended,) = (await cluster.core.get_output_async()).outputs
    assert ended.finish_reason == FinishReason.ERROR
    cluster.check_settled()


@pytest.mark.parametrize("num_beside", [0, 1])
async def test_a_request_that_makes_engines_fail_at_other_places_is_known_by_being_alone(
    num_beside: int,
) -> None:
    cluster = Cluster(num=4)
    await cluster.core.add_request_async(request(max_tokens=100))
    for _ in range(3):
        # Beside it, if anything, is what another router has sent.
        fail(get_tokens(cluster, IN_FLIGHT_TOKENS + 2, "r"), num_requests=1 + num_beside)
    assert ("r" in cluster.core._requests) is (num_beside > 0)


async def test_suspects_that_have_to_wait_for_a_replica_do_not_keep_others_from_it() -> None:
    cluster = Cluster(limits=replace(LIMITS, max_wait_s=0.01))
    for request_id in ("a", "b", "c"):
        await cluster.core.add_request_async(request(request_id))
        cluster.core._requests[request_id].failures = TWICE
    lose(cluster.prefill[0])
    lose(cluster.decode[0])
    async with asyncio.timeout(10):
        ended: list[EngineCoreOutput] = []
        while len(ended) < 3:
            ended += (await cluster.core.get_output_async()).outputs
    assert {output.finish_reason for output in ended} == {FinishReason.ERROR}
    cluster.check_settled()


async def test_an_engine_that_is_stopped_gives_its_requests_back() -> None:
    cluster = Cluster(num=2)
    await cluster.core.add_request_async(request())
    step(cluster.prefill[0], EngineCoreOutput("r", [], finish_reason=FinishReason.ABORT))
    assert [asked.request_id for asked in end_of(cluster.prefill[1]).added()] == ["r~2"]
    assert cluster.outputs() == []


async def test_a_draining_replica_that_runs_out_of_time_has_its_requests_moved() -> None:
    cluster = Cluster(num=2)
    await cluster.core.add_request_async(request())
    leaving, other = cluster.prefill
    leaving.step_received(StepOutputs([], LoadReport(leaves_because="drained")))
    await cluster.core.add_request_async(request("late"))
    lose(leaving)
    assert [asked.request_id for asked in end_of(other).added()] == ["late", "r~2"]
    assert moves(cluster, "prefill_drained") == 1


async def test_a_replica_that_falls_silent_is_given_up_and_its_requests_are_no_suspects() -> None:
    cluster = Cluster(num=2)
    for request_id in ("a", "b"):
        await cluster.core.add_request_async(request(request_id))
    silent, other = cluster.prefill
    silent.heard_s, other.heard_s = 100.0, 101.0
    for each in (silent, other):
        each.end_if_silent(now_s=110.0, timeout_s=10.0)
    assert end_of(silent).closed_because is None, "not yet longer than that"
    for each in (silent, other):
        each.end_if_silent(now_s=110.5, timeout_s=10.0)
    assert end_of(silent).closed_because == "nothing heard for 10 s"
    assert end_of(other).closed_because is None
    lose(silent)
    assert {asked.request_id for asked in end_of(other).added()} == {"a~2", "b"}
    assert moves(cluster, "prefill_replica_silent") == 1
    assert all(state.failures is None for state in cluster.core._requests.values())


async def test_a_replica_that_sends_a_long_message_is_not_silent() -> None:
    cluster = Cluster(num=1)
    (replica,) = cluster.prefill
    replica.heard_s, end_of(replica).heard_s = 100.0, 105.0
    replica.end_if_silent(now_s=114.0, timeout_s=10.0)
    assert end_of(replica).closed_because is None
    replica.end_if_silent(now_s=115.5, timeout_s=10.0)
    assert end_of(replica).closed_because is not None


async def test_a_leaving_replica_gets_nothing_new_but_finishes() -> None:
    cluster = Cluster(num=2)
    await cluster.core.add_request_async(request("r"))
    leaving, staying = cluster.prefill
    leaving.set_listed(False)
    for index in range(3):
        await cluster.core.add_request_async(request(f"late-{index}"))
    assert len(end_of(leaving).added()) == 1
    assert len(end_of(staying).added()) == 3
    step(leaving, prefilled())
    assert [output.new_token_ids for output in cluster.outputs()] == [[9]]


async def test_a_rejected_request_ends_in_an_error_with_a_status() -> None:
    cluster, note = Cluster(), RouteNote()
    NOTE.set(note)
    await cluster.core.add_request_async(request())
    cluster.prefill[0].rejected(Rejection("r", "too odd" * 1000))
    assert note.refusal is not None
    assert note.refusal.status == 400
    assert "too odd" in note.refusal.message
    assert len(note.refusal.message) < 1100
    (output,) = cluster.outputs()
    assert output.finish_reason == FinishReason.ERROR
    cluster.check_settled()


@pytest.mark.parametrize("pool", ["prefill", "decode"])
async def test_an_engine_that_fails_with_a_request_gives_its_answer_a_status(pool: str) -> None:
    cluster, note = Cluster(), RouteNote()
    NOTE.set(note)
    options: dict[str, Any] = {"prompt_logprobs": 1} if pool == "decode" else {}
    await cluster.core.add_request_async(request(**options))
    (replica,) = cluster.prefill if pool == "prefill" else cluster.decode
    step(replica, EngineCoreOutput("r", [], finish_reason=FinishReason.ERROR))
    assert isinstance(note.error, GenerationError)
    (output,) = cluster.outputs()
    assert output.finish_reason == FinishReason.ERROR
    cluster.check_settled()


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


async def test_outputs_name_the_weights_as_an_engine_does() -> None:
    cluster = Cluster()
    await cluster.core.add_request_async(request())
    step(cluster.prefill[0], prefilled())
    assert (await cluster.core.get_output_async()).weight_version == "default"


async def test_a_prompt_of_embeddings_counts_by_its_length() -> None:
    asked = request()
    asked.prompt_token_ids, asked.prompt_embeds = None, torch.zeros((10, 8))
    assert RequestState(request=asked, output_token_ids=[1]).num_tokens == 11
