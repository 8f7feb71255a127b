"""Admission and the order of waiting prompts: tables from what is expected to a plan."""

import random

import pytest

from router.admission import (
    AdmissionLimits,
    AdmissionPlan,
    DecodeOutlook,
    Expectation,
    plan_admission,
)
from router.costs import DecodeCost
from router.deadline_order import CLIENT_STEP_S, latest_start_ms
from router.slo import Slo

SLO = Slo(ttft_s=0.5, itl_s=0.05)
QUEUES = AdmissionLimits()
REFUSES = AdmissionLimits(refuses=True)
BOUNDED = AdmissionLimits(max_queued=10)


def expected(ttft_s: float = 0.1, itl_s: float = 0.01, num_queued: int = 0) -> Expectation:
    return Expectation(ttft_s=ttft_s, itl_s=itl_s, num_queued=num_queued)


@pytest.mark.parametrize(
    ("of", "limits", "plan"),
    [
        pytest.param(expected(), REFUSES, (True, "taken", 0), id="in-time"),
        pytest.param(expected(ttft_s=0.5), REFUSES, (True, "taken", 0), id="just-in-time"),
        pytest.param(expected(ttft_s=3.2), REFUSES, (False, "ttft", 3), id="ttft-late"),
        pytest.param(expected(ttft_s=0.6), REFUSES, (False, "ttft", 1), id="at-least-a-second"),
        pytest.param(expected(itl_s=0.06), REFUSES, (False, "itl", 1), id="decode-is-full"),
        pytest.param(expected(ttft_s=99, itl_s=9), QUEUES, (True, "taken", 0), id="queues"),
        pytest.param(expected(num_queued=9), BOUNDED, (True, "taken", 0), id="last-place"),
        pytest.param(
            expected(ttft_s=4.0, num_queued=10), BOUNDED, (False, "queue_full", 4), id="no-place"
        ),
        pytest.param(expected(num_queued=10**6), QUEUES, (True, "taken", 0), id="unbounded"),
    ],
)
def test_admission(of: Expectation, limits: AdmissionLimits, plan: tuple[bool, str, int]) -> None:
    admits, reason, retry_after_s = plan
    assert plan_admission(of, SLO, limits) == AdmissionPlan(
        admits=admits, reason=reason, retry_after_s=retry_after_s
    )


def outlook(num_arriving: float = 0.0) -> DecodeOutlook:
    """Steps of 20 ms now, of which answers take 100."""
    return DecodeOutlook(
        cost=DecodeCost(base_s=0.01, per_request_s=0.001, per_context_token_s=0.0),
        mean_work_s=0.01,
        num_replicas=2,
        num_arriving=num_arriving,
        share_s=0.001,
        num_output_tokens=100,
    )


@pytest.mark.parametrize(
    ("num_arriving", "after_s", "itl_s"),
    [
        pytest.param(0, 0.0, 0.021, id="now"),
        pytest.param(0, 1.0, 0.016, id="half-have-ended"),
        pytest.param(0, 60.0, 0.011, id="all-have-ended"),
        pytest.param(20, 0.0, 0.031, id="those-before-it-come-too"),
        pytest.param(20, 1.0, 0.026, id="some-come-some-go"),
    ],
)
def test_decode_is_judged_at_the_end_of_prefill(
    num_arriving: float, after_s: float, itl_s: float
) -> None:
    assert outlook(num_arriving).itl_s(after_s) == pytest.approx(itl_s)


def start(arrival_s: float, prefill_s: float, client_priority: int = 0) -> int:
    return latest_start_ms(
        arrival_s=arrival_s, prefill_s=prefill_s, ttft_s=0.5, client_priority=client_priority
    )


def test_short_prompts_pass_a_long_one() -> None:
    long = start(arrival_s=0.0, prefill_s=10.0)
    assert all(start(arrival_s=at, prefill_s=0.01) < long for at in (0.0, 1.0, 5.0))


def test_nothing_waits_for_ever() -> None:
    """What comes long after a prompt queues behind it, however short and urgent."""
    long = start(arrival_s=0.0, prefill_s=10.0)
    assert start(arrival_s=31.0, prefill_s=0.01) > long
    assert start(arrival_s=31.0 + 5 * CLIENT_STEP_S, prefill_s=0.01, client_priority=-5) > long


def test_among_equals_the_first_comes_first_and_the_client_may_say_otherwise() -> None:
    assert start(1.0, 0.1) < start(1.1, 0.1)
    assert start(1.1, 0.1, client_priority=-1) < start(1.0, 0.1)


def test_one_long_prompt_does_not_make_fifty_short_ones_late() -> None:
    """The head of the line in pure code: steps of 0.1 s, each for the most urgent prompt there."""
    rng = random.Random(0)
    left = {"long": 20.0}
    order = {"long": start(0.0, 20.0)}
    came = {f"short-{number}": rng.uniform(0, 10) for number in range(50)}
    done: dict[str, float] = {}
    waiting, now_s = dict(came), 0.0
    while left or waiting:
        for name in [name for name, at_s in waiting.items() if at_s <= now_s]:
            del waiting[name]
            left[name], order[name] = 0.1, start(came[name], 0.1)
        chosen = min(left, key=lambda name: (order[name], name), default=None)
        now_s += 0.1
        if chosen is not None:
            left[chosen] -= 0.1
            if left[chosen] < 1e-9:
                del left[chosen]
                done[chosen] = now_s
    late = [name for name, at_s in came.items() if done[name] - at_s > 0.5 + 0.2]
    assert late == []
    assert done["long"] == pytest.approx(25.0, abs=0.3)
