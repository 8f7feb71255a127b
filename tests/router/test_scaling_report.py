"""What a router reports for scaling comes out of Serve's numbers as it went in."""

import pytest

from router.costs import DecodeCost
from router.scaling_report import PoolSize, ScalingReport, TrafficCounts

COUNTS = TrafficCounts(
    arrivals=1,
    arrived_prefill_s=0.5,
    arrived_prefill_squared_s2=0.25,
    prompt_tokens=3,
    ended=4,
    output_tokens=5,
    ttft_measured=6,
    ttft_met=7,
    itl_measured=8,
    itl_met=9,
)
REPORT = ScalingReport(
    counts=COUNTS,
    prefill_backlog_s=1.5,
    num_decoding=10,
    kv_usage_fraction=0.5,
    num_kv_tokens=11,
    max_batch=12,
    decode_cost=DecodeCost(base_s=0.1, per_request_s=0.2, per_context_token_s=0.3),
    prefill=PoolSize(num_ready=13, num_draining=14),
    decode=PoolSize(num_ready=15, num_draining=16),
)
BEFORE_THE_FIRST_ENGINE = ScalingReport(
    counts=TrafficCounts(),
    prefill_backlog_s=0.0,
    num_decoding=0,
    kv_usage_fraction=0.0,
    num_kv_tokens=None,
    max_batch=None,
    decode_cost=DecodeCost(),
    prefill=PoolSize(num_ready=0, num_draining=0),
    decode=PoolSize(num_ready=0, num_draining=0),
)


@pytest.mark.parametrize("report", [REPORT, BEFORE_THE_FIRST_ENGINE])
def test_there_and_back(report: ScalingReport) -> None:
    stats = report.to_stats()
    assert {type(value) for value in stats.values()} == {float}
    assert ScalingReport.from_stats(stats) == report


def test_the_names_that_serve_carries() -> None:
    """Routers of another version may report to this controller."""
    assert sorted(REPORT.to_stats()) == [
        "arrivals", "arrived_prefill_s", "arrived_prefill_squared_s2", "decode_base_s",
        "decode_draining", "decode_per_context_token_s", "decode_per_request_s", "decode_ready",
        "ended", "itl_measured", "itl_met", "kv_usage_fraction", "max_batch", "num_decoding",
        "num_kv_tokens", "output_tokens", "prefill_backlog_s", "prefill_draining", "prefill_ready",
        "prompt_tokens", "ttft_measured", "ttft_met",
    ]  # fmt: skip


@pytest.mark.parametrize("stats", [{}, {"something_of_serves": 1.0}])
def test_what_is_no_report(stats: dict[str, float]) -> None:
    assert ScalingReport.from_stats(stats) is None


def test_counts_add_up_and_never_go_down() -> None:
    assert (COUNTS + COUNTS).since(COUNTS) == COUNTS
    assert TrafficCounts().since(COUNTS) == TrafficCounts()
