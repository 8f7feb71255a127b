"""How large the pieces of prompts are."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from engine.step_limit import (
    LEAST_PIECE,
    STEP_LIMIT,
    next_piece,
    num_at_once,
    share_of_one,
    step_limit_s,
)

LIMIT_S = 0.1
MOST = 4096


@pytest.mark.parametrize(
    ("num_prefill_tokens", "seconds", "expected"),
    [
        pytest.param(1000, 0.08, 1250, id="in-time"),
        pytest.param(1000, 0.01, 2000, id="doubles-at-most"),
        pytest.param(1000, 0.125, 800, id="too-long"),
        pytest.param(1000, 9.0, 500, id="halves-at-most"),
        pytest.param(1000, 0.1, 1000, id="just-right"),
        pytest.param(100, 0.05, 1000, id="a-short-last-piece-says-nothing-about-more"),
        pytest.param(900, 0.05, 1800, id="nearly-the-whole-piece-does"),
        pytest.param(100, 0.125, 500, id="too-long-for-a-short-one-is-too-long-for-more"),
        pytest.param(2000, 0.2, 1000, id="scheduled-with-the-piece-before-it-was-halved"),
        pytest.param(8000, 0.4, 1000, id="a-prompt-without-a-limit-says-nothing-about-less"),
        pytest.param(0, 9.0, 1000, id="read-nothing"),
    ],
)
def test_the_next_piece(num_prefill_tokens: int, seconds: float, expected: float) -> None:
    assert next_piece(
        1000,
        limit_s=LIMIT_S,
        seconds=seconds,
        num_prefill_tokens=num_prefill_tokens,
        most=MOST,
    ) == pytest.approx(expected)


def pieces(step_s: Callable[[int, int], float], num_steps: int) -> list[int]:
    """Of a long prompt, where a step takes `step_s` of its number and of what it reads."""
    piece: float = LEAST_PIECE
    found = []
    for step in range(num_steps):
        found.append(int(piece))
        seconds = step_s(step, int(piece))
        piece = next_piece(
            piece, limit_s=LIMIT_S, seconds=seconds, num_prefill_tokens=int(piece), most=MOST
        )
    return found


@pytest.mark.parametrize(
    ("answers_s", "per_token_s", "expected"),
    [
        pytest.param(0.02, 0.0001, 800, id="what-the-answers-leave"),
        pytest.param(0.02, 0.000001, MOST, id="all-fits"),
        pytest.param(0.3, 0.0001, LEAST_PIECE, id="the-answers-alone-take-longer"),
    ],
)
def test_pieces_come_to_what_fits(answers_s: float, per_token_s: float, expected: int) -> None:
    found = pieces(lambda _, num_tokens: answers_s + per_token_s * num_tokens, 20)
    assert found[-1] == pytest.approx(expected, rel=0.02)
    assert all(piece <= 1.01 * expected for piece in found)


def test_a_stalled_step_does_not_matter_for_long() -> None:
    found = pieces(lambda step, n: 5.0 if step == 20 else 0.02 + 0.0001 * n, 26)
    assert found[21] == pytest.approx(found[20] / 2, rel=0.02)
    assert found[25] == pytest.approx(found[20], rel=0.05)


@pytest.mark.parametrize(
    ("piece", "num_prompts", "share"),
    [
        pytest.param(1000, 0, 1000, id="nobody-yet"),
        pytest.param(1000, 1, 1000, id="one"),
        pytest.param(1000, 3, 333, id="shared"),
        pytest.param(100, 3, LEAST_PIECE, id="at-least"),
        pytest.param(32, 3, 32, id="an-engine-of-small-steps"),
    ],
)
def test_shares(piece: float, num_prompts: int, share: int) -> None:
    assert share_of_one(piece, num_prompts) == share


@pytest.mark.parametrize("piece", [1, 64, 127.9, 128, 1000, 4096])
def test_as_many_prompts_share_a_piece_as_it_has_room_for(piece: float) -> None:
    num_prompts = num_at_once(piece)
    assert num_prompts >= 1
    assert num_prompts * share_of_one(piece, num_prompts) <= piece


@pytest.mark.parametrize(
    ("extra_args", "expected"),
    [(None, None), ({}, None), ({"other": 1}, None), ({STEP_LIMIT: 0.05}, 0.05)],
)
def test_the_limit_comes_with_the_request(
    extra_args: dict[str, float] | None, expected: float | None
) -> None:
    assert step_limit_s(SimpleNamespace(extra_args=extra_args)) == expected


def test_a_request_without_sampling_has_none() -> None:
    assert step_limit_s(None) is None
