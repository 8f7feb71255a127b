"""The fitted cost model finds the engine behind the steps, whatever else happens to them."""

import random
from collections.abc import Callable

import pytest

from router.cost_fit import CostFit, PoolCost, StepShape
from router.costs import DecodeCost, PrefillCost

A100 = PoolCost(
    prefill=PrefillCost(base_s=0.022, per_token_s=1.4e-4, per_token_squared_s=8e-9),
    decode=DecodeCost(base_s=0.023, per_request_s=6e-5, per_context_token_s=5.9e-7),
)
"""DistServe's profile of OPT-13B: ten to twenty times the prior's times, in other proportions."""

Steps = Callable[[random.Random], StepShape]


def prompt(rng: random.Random) -> StepShape:
    num_tokens = int(rng.lognormvariate(6, 1))
    return StepShape(num_prefill_tokens=num_tokens, prefill_attention=num_tokens**2)


def batch(rng: random.Random) -> StepShape:
    num = rng.randint(1, 64)
    return StepShape(num_decodes=num, num_context_tokens=num * rng.randint(100, 2000))


def both(rng: random.Random) -> StepShape:
    read, decoded = prompt(rng), batch(rng)
    return StepShape(
        num_prefill_tokens=read.num_prefill_tokens,
        prefill_attention=read.prefill_attention,
        num_decodes=decoded.num_decodes,
        num_context_tokens=decoded.num_context_tokens,
    )


def fitted(true: PoolCost, steps: Steps, *, num: int = 600, stalled: float = 0.0) -> CostFit:
    """After `num` steps with 5 % of noise; the share `stalled` took 3 to 30 times as long."""
    rng, fit = random.Random(1), CostFit()
    for _ in range(num):
        shape = steps(rng)
        seconds = true.step_s(shape) * max(0.1, rng.gauss(1.0, 0.05))
        fit.observe(shape, seconds * (rng.uniform(3, 30) if rng.random() < stalled else 1))
    return fit


def mean_error(cost: PoolCost, true: PoolCost, steps: Steps) -> float:
    rng = random.Random(2)
    shapes = [steps(rng) for _ in range(200)]
    return sum(abs(cost.step_s(each) / true.step_s(each) - 1) for each in shapes) / len(shapes)


@pytest.mark.parametrize("stalled", [0.0, 0.05])
@pytest.mark.parametrize("steps", [prompt, batch, both])
@pytest.mark.parametrize("true", [A100, PoolCost()], ids=["a100", "as-the-prior"])
def test_predicts_steps_like_those_it_saw(true: PoolCost, steps: Steps, stalled: float) -> None:
    cost = fitted(true, steps, stalled=stalled).cost
    assert mean_error(cost, true, steps) < 0.05


def test_without_steps_it_is_the_prior() -> None:
    assert CostFit(A100).cost == A100


def test_what_the_traffic_does_not_show_keeps_the_priors_proportions() -> None:
    """Prompts of one length say nothing of how the time is made up."""
    always = StepShape(num_prefill_tokens=512, prefill_attention=512**2)
    cost = fitted(A100, lambda rng: always).cost
    slower = A100.step_s(always) / PoolCost().step_s(always)
    assert cost.step_s(always) == pytest.approx(A100.step_s(always), rel=0.02)
    twice = StepShape(num_prefill_tokens=1024, prefill_attention=1024**2)
    assert cost.step_s(twice) == pytest.approx(slower * PoolCost().step_s(twice), rel=0.1)


def test_an_engine_that_becomes_slower_is_followed() -> None:
    fit, rng = fitted(PoolCost(), batch), random.Random(3)
    for _ in range(2000):
        shape = batch(rng)
        fit.observe(shape, 3 * PoolCost().step_s(shape))
    shape = batch(rng)
    assert fit.cost.step_s(shape) == pytest.approx(3 * PoolCost().step_s(shape), rel=0.1)


def test_no_coefficient_is_negative() -> None:
    """Longer prompts that take less time, as when caches warm up, do not make prompts free."""
    fit = CostFit()
    for num_tokens in range(32, 2048, 8):
        shape = StepShape(num_prefill_tokens=num_tokens, prefill_attention=num_tokens**2)
        fit.observe(shape, 1.0 / num_tokens)
    cost = fit.cost
    assert min(cost.prefill.base_s, cost.prefill.per_token_s, cost.prefill.per_token_squared_s) >= 0
    assert cost.step_s(StepShape(num_prefill_tokens=4096, prefill_attention=4096**2)) > 0


def test_attention_over_what_is_cached_is_not_computed_again() -> None:
    cost = PrefillCost(base_s=0.0, per_token_s=0.0, per_token_squared_s=1.0)
    assert cost.seconds(num_uncached=10, num_tokens=10) == 100
    assert cost.seconds(num_uncached=4, num_tokens=10) == 100 - 36


def test_a_decode_step_is_the_base_and_the_shares_of_its_requests() -> None:
    cost = DecodeCost()
    shares = 3 * cost.share_s(num_context_tokens=500)
    step_s = cost.step_s(batch=3, num_context_tokens=1500)
    assert step_s == pytest.approx(cost.base_s + shares)
