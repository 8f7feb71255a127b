"""Other systems' formulas on observations made by hand."""

from dataclasses import replace

import pytest

from benchmarks.simulate.autoscalers.baselines import Dynamo, HeteroScale, LlmD, RayServe
from benchmarks.simulate.model.fleet import FleetSpec
from benchmarks.simulate.model.history import History, Observation, PoolView
from benchmarks.simulate.model.profiles import LLAMA_8B_H100
from benchmarks.simulate.model.scaled_run import FleetSize, within_budget
from benchmarks.simulate.workloads.demand import MeanShape, decode_requests_per_s, max_batch
from router.slo import Slo

SLO = Slo(ttft_s=1.0, itl_s=0.05)
SPEC = FleetSpec(prefill=LLAMA_8B_H100, decode=LLAMA_8B_H100)
POOL = PoolView(
    num_ready=4,
    num_starting=0,
    num_draining=0,
    num_waiting=0,
    num_ongoing=8,
    waiting_tokens=0,
    kv_tokens=0,
    kv_capacity_tokens=100_000,
)


def seen(now_s: float, *, history: History | None = None, prefill: PoolView = POOL) -> Observation:
    return Observation(
        now_s=now_s,
        prefill=prefill,
        decode=POOL,
        history=history or History(),
        prefill_backlog_s=0.0,
        num_decoding=0,
    )


def with_ttft(now_s: float, ttft_s: float) -> History:
    history = History()
    for _ in range(10):
        history.ttfts_s.add(now_s - 1.0, ttft_s)
    return history


def test_ray_serve_waits_before_it_grows_to_two_a_replica() -> None:
    policy = RayServe()
    busy = replace(POOL, num_ongoing=20)
    sizes = [policy.plan(seen(now_s, prefill=busy)).prefill for now_s in range(0, 36, 5)]
    assert sizes == [4, 4, 4, 4, 4, 4, 10, 10]


def test_ray_serve_shrinks_after_ten_minutes() -> None:
    policy = RayServe()
    idle = replace(POOL, num_ongoing=2)
    sizes = {now_s: policy.plan(seen(now_s, prefill=idle)).prefill for now_s in range(0, 601, 5)}
    assert sizes[595] == 4
    assert sizes[600] == 1


@pytest.mark.parametrize(
    ("ttft_s", "expected"),
    [
        pytest.param(1.1, 8, id="twice 0.55: twice as many"),
        pytest.param(5.0, 15, id="a share counts as 2 at most: ceil(4*(2/0.55-1)) more"),
        pytest.param(0.5, 4, id="between the bounds"),
        pytest.param(0.1, 4, id="shrinks only after 300 s"),
    ],
)
def test_llm_d_follows_its_formula(ttft_s: float, expected: int) -> None:
    plan = LlmD(SLO).plan(seen(100.0, history=with_ttft(100.0, ttft_s)))
    assert plan.prefill == expected


def test_llm_d_shrinks_once_no_wish_of_five_minutes_is_larger() -> None:
    policy = LlmD(SLO)
    sizes = [
        policy.plan(seen(now_s, history=with_ttft(now_s, 0.1))).prefill
        for now_s in (100.0 + 15 * step for step in range(21))
    ]
    assert sizes == [4] * 19 + [1] * 2


def test_dynamo_s_floor_is_the_rate_over_an_engine_s() -> None:
    policy = Dynamo(SPEC, SLO)
    history = History()
    for second in range(180):
        for _ in range(40):
            history.prompt_tokens.add(float(second), 4000)
            history.output_tokens.add(float(second), 100)
    plan = policy.plan(seen(180.0, history=history))
    shape = MeanShape(prompt_tokens=4000, output_tokens=100, prefill_s=0.0)
    per_engine = decode_requests_per_s(LLAMA_8B_H100, shape, SLO.itl_s)
    assert plan.decode >= 40 / per_engine
    assert plan.prefill >= 40 * 4000 * LLAMA_8B_H100.prefill.per_token_s


def test_dynamo_adds_one_where_every_engine_is_late() -> None:
    history = History()
    history.prompt_tokens.add(1.0, 4000)
    history.output_tokens.add(1.0, 100)
    late = replace(POOL, waiting_tokens=4 * 200_000)
    assert Dynamo(SPEC, SLO).plan(seen(5.0, history=history, prefill=late)).prefill == 5


def test_heteroscale_keeps_the_ratio() -> None:
    shape = MeanShape(prompt_tokens=4000, output_tokens=100, prefill_s=0.2)
    policy = HeteroScale(SPEC, SLO, shape)
    per_engine = decode_requests_per_s(LLAMA_8B_H100, shape, SLO.itl_s)
    history = History()
    for second in range(60):
        history.output_tokens.add(float(second), 0.8 * per_engine * 100 * 10)
    plan = policy.plan(seen(60.0, history=history))
    assert plan.decode == pytest.approx(10, abs=1)
    ratio = per_engine * 0.2
    assert ratio * (plan.decode - 1) < plan.prefill <= ratio * plan.decode + 1


def test_a_batch_is_bounded_by_itl_and_by_kv() -> None:
    by_itl = max_batch(LLAMA_8B_H100, 1000.0, 0.02)
    assert LLAMA_8B_H100.step_s(by_itl, by_itl * 1000.0) <= 0.02
    assert LLAMA_8B_H100.step_s(by_itl + 1, (by_itl + 1) * 1000.0) > 0.02
    assert max_batch(LLAMA_8B_H100, 100_000.0, 10.0) * 100_000 < LLAMA_8B_H100.kv_capacity_tokens


@pytest.mark.parametrize(
    ("wanted", "budget", "expected"),
    [
        (FleetSize(3, 4), 8, FleetSize(3, 4)),
        (FleetSize(0, 0), 8, FleetSize(1, 1)),
        (FleetSize(30, 10), 8, FleetSize(6, 2)),
        (FleetSize(100, 1), 8, FleetSize(7, 1)),
    ],
)
def test_both_pools_share_the_budget(wanted: FleetSize, budget: int, expected: FleetSize) -> None:
    assert within_budget(wanted, SPEC, budget) == expected
