"""What a router counts for scaling."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
from fake_replicas import new_replica, replica_facts, request

from kvtransfer.phase import Phase
from router.costs import DecodeCost, PrefillCost
from router.phases import RequestPhase
from router.policies import POLICIES
from router.pool import Pool
from router.request import RequestState
from router.scaling_report import ScalingReport
from router.slo import Slo
from router.traffic import ENOUGH_MEASURED, WARM_UP_S, TrafficMeter


def replica(age_s: float) -> Any:
    return SimpleNamespace(joined_s=time.monotonic() - age_s)


WARM = replica(WARM_UP_S + 1)


def empty_pool(name: Phase) -> Pool:
    return Pool(name, POLICIES["p2c"])


def report(meter: TrafficMeter, *requests: RequestState) -> ScalingReport:
    return meter.report(
        prefill=empty_pool("prefill"), decode=empty_pool("decode"), requests=requests
    )


def waiting() -> RequestState:
    state = RequestState(request=request())
    state.enter(RequestPhase.WAITING, now_s=0.0)
    return state


def test_counts_arrivals_and_targets_met() -> None:
    meter = TrafficMeter(Slo(ttft_s=0.5, itl_s=0.01))
    meter.arrived(prefill_s=0.2, num_tokens=100)
    meter.arrived(prefill_s=0.4, num_tokens=300)
    meter.first_token(WARM, 0.5)
    meter.first_token(WARM, 0.6)
    meter.ended(WARM, 11, 0.1)
    meter.ended(WARM, 11, 0.2)
    seen = report(meter, waiting())
    assert (seen.counts.arrivals, seen.counts.prompt_tokens) == (2, 400)
    assert seen.counts.arrived_prefill_s == pytest.approx(0.6)
    assert seen.counts.arrived_prefill_squared_s2 == pytest.approx(0.2)
    assert (seen.counts.ttft_measured, seen.counts.ttft_met) == (2, 1)
    assert (seen.counts.itl_measured, seen.counts.itl_met) == (2, 1)
    assert (seen.counts.ended, seen.counts.output_tokens) == (2, 22)
    assert seen.num_decoding == 1


def test_says_what_a_decode_engine_holds() -> None:
    decode = empty_pool("decode")
    facts = replica_facts("d", block_size=16, num_kv_blocks=10, max_num_seqs=4)
    decode.insert(new_replica(decode, "d", facts=facts))
    meter = TrafficMeter(Slo(ttft_s=0.5, itl_s=0.01))
    seen = meter.report(prefill=empty_pool("prefill"), decode=decode, requests=())
    assert (seen.num_kv_tokens, seen.max_batch) == (160, 4)


@pytest.mark.parametrize("is_gone", [False, True], ids=["warming-up", "gone"])
def test_replicas_that_warm_up_are_not_measured(is_gone: bool) -> None:
    fresh = None if is_gone else replica(0.0)
    meter = TrafficMeter(Slo(ttft_s=0.5, itl_s=0.01))
    meter.first_token(fresh, 0.1)
    meter.ended(fresh, 10, 0.1)
    seen = report(meter)
    assert (seen.counts.ttft_measured, seen.counts.itl_measured) == (0, 0)
    assert seen.counts.ended == 1


def test_an_answer_of_one_token_has_no_latency_between_tokens() -> None:
    meter = TrafficMeter(Slo(ttft_s=0.5, itl_s=0.01))
    meter.ended(WARM, 1, 0.0)
    assert report(meter).counts.itl_measured == 0


def test_says_what_is_out_of_reach_as_predicted_and_as_measured(
    caplog: pytest.LogCaptureFixture,
) -> None:
    meter = TrafficMeter(Slo(ttft_s=0.5, itl_s=0.001))
    meter.predict(PrefillCost(), DecodeCost(base_s=0.002))
    assert [line.rpartition(" ")[2] for line in caplog.messages] == ["predicted"]
    for _ in range(ENOUGH_MEASURED + 1):
        meter.first_token(WARM, 0.1)
        meter.ended(WARM, 11, 0.05)
    assert len(caplog.messages) == 2
    assert "slo.itl_s: 0.001 s cannot be met" in caplog.messages[1]
    assert "0.005 s, as measured" in caplog.messages[1]
