"""Targets that cannot be met."""

import pytest

from router.costs import DecodeCost, PrefillCost
from router.slo import Slo
from router.slo_feasibility import BestCase, describe_infeasible, predict_best

BEST = BestCase(ttft_s=0.01, itl_s=0.004)
ROWS = [
    ("both-met", 0.01, 0.004, ()),
    ("itl", 0.5, 0.003,
     ("slo.itl_s: 0.003 s cannot be met with any number of replicas: the best that can be had is "
      "0.004 s, as measured",)),
    ("ttft", 0.001, 0.05,
     ("slo.ttft_s: 0.001 s cannot be met with any number of replicas: the best that can be had is "
      "0.01 s, as measured",)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("ttft_s", "itl_s", "lines"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS]
)
def test_what_cannot_be_met(ttft_s: float, itl_s: float, lines: tuple[str, ...]) -> None:
    assert describe_infeasible(BEST, Slo(ttft_s=ttft_s, itl_s=itl_s), how="measured") == lines


def test_the_unknown_is_not_infeasible() -> None:
    nothing = BestCase(ttft_s=None, itl_s=None)
    assert describe_infeasible(nothing, Slo(ttft_s=1e-9, itl_s=1e-9), how="measured") == ()


def test_prediction_is_of_one_token_alone() -> None:
    best = predict_best(
        PrefillCost(base_s=0.02, per_token_s=0.001, per_token_squared_s=0.0),
        DecodeCost(base_s=0.01, per_request_s=0.002, per_context_token_s=0.001),
    )
    assert best.ttft_s == pytest.approx(0.021)
    assert best.itl_s == pytest.approx(0.013)
