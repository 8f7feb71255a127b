"""What routers report, as a scaling plan gets it."""

import pytest

from cluster.reports import STALE_S, UNKNOWN_ENGINES, Look, Reports
from router.scaling_report import ScalingReport

EMPTY = {
    "prefill_backlog_s": 0.0, "num_decoding": 0.0, "kv_usage_fraction": 0.0,
    "num_kv_tokens": 1000.0, "decode_base_s": 0.01, "decode_per_request_s": 0.001,
    "decode_per_context_token_s": 0.0, "prefill_ready": 1.0, "decode_ready": 2.0,
    "prefill_draining": 0.0, "decode_draining": 0.0, "arrivals": 0.0, "prompt_tokens": 0.0,
    "arrived_prefill_s": 0.0, "ended": 0.0, "ttft_measured": 0.0, "ttft_met": 0.0,
}  # fmt: skip


def look(router_id: str, at_s: float, **values: float) -> Look:
    report = ScalingReport.from_stats({**EMPTY, **values})
    assert report is not None
    return Look(router_id=router_id, at_s=at_s, report=report)


def test_differences_of_counters_by_the_second() -> None:
    reports = Reports()
    first = [look("a", 10.0, arrivals=5)]
    observed = reports.observe(first, 10.0)
    assert observed is not None
    assert observed.traffic == ()
    later = [look("a", 10.5, arrivals=6), look("a", 11.5, arrivals=9, ttft_measured=2, ttft_met=1)]
    observed = reports.observe([*first, *later], 12.0)
    assert observed is not None
    assert [each.num_arrivals for each in observed.traffic] == [1, 3]
    assert [each.duration_s for each in observed.traffic] == [1.0, 1.0]
    assert (observed.traffic[1].ttft.num, observed.traffic[1].ttft.num_met) == (2, 1)


def test_a_report_that_comes_late_is_counted_once() -> None:
    reports = Reports()
    old = look("a", 9.0, arrivals=1)
    reports.observe([old], 10.0)
    late = look("a", 9.8, arrivals=4)
    observed = reports.observe([old, late], 12.0)
    assert observed is not None
    assert [each.num_arrivals for each in observed.traffic] == [3, 0]
    observed = reports.observe([old, late], 14.0)
    assert observed is not None
    assert sum(each.num_arrivals for each in observed.traffic) == 0


def test_routers_add_up_and_a_dead_one_vanishes() -> None:
    reports = Reports()
    start = [look("a", 10.0, num_decoding=3), look("b", 10.0, num_decoding=4)]
    observed = reports.observe(start, 10.0)
    assert observed is not None
    assert observed.load.num_decoding == 7
    assert (observed.num_ready["prefill"], observed.num_ready["decode"]) == (1, 2)
    observed = reports.observe([look("b", 11.0, num_decoding=4)], 11.0)
    assert observed is not None
    assert observed.load.num_decoding == 4


def test_a_router_that_comes_back_does_not_count_all_it_ever_saw() -> None:
    reports = Reports()
    reports.observe([look("a", 10.0)], 10.0)
    observed = reports.observe([look("a", 11.0), look("b", 11.0, arrivals=1000)], 11.0)
    assert observed is not None
    assert [each.num_arrivals for each in observed.traffic] == [0]


@pytest.mark.parametrize("looks", [[], [look("a", 0.0)]], ids=["none", "stale"])
def test_silence_is_no_traffic_of_zero(looks: list[Look]) -> None:
    assert Reports().observe(looks, STALE_S + 1.0) is None


@pytest.mark.parametrize(
    ("reported", "max_batch"),
    [
        pytest.param({"max_batch": 4.0}, 4, id="said"),
        pytest.param({"max_batch": 0.0}, UNKNOWN_ENGINES.max_batch, id="no-decode-engine-yet"),
    ],
)
def test_the_batch_that_a_decode_engine_runs_at_most(
    reported: dict[str, float], max_batch: int
) -> None:
    observed = Reports().observe([look("a", 10.0, **reported)], 10.0)
    assert observed is not None
    assert observed.engines.max_batch == max_batch
