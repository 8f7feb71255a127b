"""How much of a prompt is read beside answers, step by step."""

import pytest

from engine.pieces import LEAST_PIECE, STEP_LIMIT, next_piece, step_limit_s

MOST = 2048


@pytest.mark.parametrize(
    ("num_read", "seconds", "following"),
    [
        pytest.param(400, 0.03, 400, id="as-long-as-asked"),
        pytest.param(400, 0.04, 300, id="too-long"),
        pytest.param(400, 0.02, 600, id="shorter"),
        pytest.param(400, 9.0, 200, id="a-stall-halves-it"),
        pytest.param(400, 0.001, 800, id="doubles-at-most"),
        pytest.param(100, 0.02, 400, id="the-end-of-a-prompt-is-no-reason-for-more"),
        pytest.param(100, 0.06, 200, id="nor-for-less-caution"),
    ],
)
def test_the_next_piece(num_read: int, seconds: float, following: int) -> None:
    found = next_piece(400, num_read=num_read, seconds=seconds, limit_s=0.03, most=MOST)
    assert found == following


@pytest.mark.parametrize(
    ("piece", "seconds", "following"),
    [(LEAST_PIECE, 1.0, LEAST_PIECE), (MOST, 0.001, MOST)],
)
def test_a_piece_has_bounds(piece: int, seconds: float, following: int) -> None:
    found = next_piece(piece, num_read=piece, seconds=seconds, limit_s=0.03, most=MOST)
    assert found == following


@pytest.mark.parametrize("answers_s", [0.005, 0.02, 0.028])
def test_it_settles_where_steps_take_the_limit(answers_s: float) -> None:
    token_s, piece = 30e-6, 256
    for _ in range(60):
        seconds = answers_s + token_s * piece
        piece = next_piece(piece, num_read=piece, seconds=seconds, limit_s=0.03, most=MOST)
    assert piece == pytest.approx((0.03 - answers_s) / token_s, rel=0.1)


def test_where_the_limit_is_read_from() -> None:
    assert step_limit_s(None) is None
    assert step_limit_s({"other": 1}) is None
    assert step_limit_s({STEP_LIMIT: 0.04}) == 0.04
