"""What routing expects of a request, learned from others."""

import pytest

from router.prediction import Predictor


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [
        pytest.param(None, 128, id="as-long-as-others"),
        pytest.param(1000, 128, id="longer-is-allowed"),
        pytest.param(7, 7, id="it-may-not-be-so-long"),
    ],
)
def test_how_long_a_response_is_before_any_was_seen(max_tokens: int | None, expected: int) -> None:
    assert Predictor().output_tokens(max_tokens) == expected


def test_responses_move_the_mean_and_none_is_expected_to_be_empty() -> None:
    predictor = Predictor()
    predictor.observe_response(228)
    assert predictor.output_tokens(None) == 130
    for _ in range(1000):
        predictor.observe_response(0)
    assert predictor.output_tokens(None) == 1


def test_transfers_move_their_mean() -> None:
    predictor = Predictor()
    before_s = predictor.transfer_s(100)
    predictor.observe_transfer(before_s + 1.0)
    assert predictor.transfer_s(100) == pytest.approx(before_s + 0.02)
