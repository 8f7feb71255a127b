"""What counts as a tie between two answers."""

from typing import Any

import pytest
from ties import unlike


def answer(*tokens: int, second: float = -1.0) -> dict[str, Any]:
    """Token by token, each beside token 9 with the logprob `second`."""
    content = [
        {
            "top_logprobs": [
                {"token": f"token_id:{token}", "logprob": -0.9},
                {"token": "token_id:9", "logprob": second},
            ]
        }
        for token in tokens
    ]
    return {"choices": [{"token_ids": list(tokens), "logprobs": {"content": content}}]}


@pytest.mark.parametrize(
    ("expected", "actual", "is_like"),
    [
        pytest.param(answer(1, 2), answer(1, 2), True, id="the-same"),
        pytest.param(answer(1, 2, 3), answer(1, 9, 5), True, id="parted-at-a-tie"),
        pytest.param(answer(1, 2, second=-2.0), answer(1, 9), False, id="no-tie"),
        pytest.param(answer(1, 2), answer(1, 5), False, id="neither-of-the-two"),
        pytest.param(answer(1, 2), answer(1, 2, 3), False, id="longer"),
    ],
)
def test_unlike(expected: dict[str, Any], actual: dict[str, Any], is_like: bool) -> None:
    assert (unlike(expected, actual) == []) == is_like
