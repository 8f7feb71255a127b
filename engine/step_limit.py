"""How much of a prompt a step may read, so that the answers in it do not wait longer than a limit.

The limit comes with the prompt, in `SamplingParams.extra_args`; what an engine makes of it is in
`engine.pieces`. Owns the key. Pure: no model of what a step costs, only what the last one took.
"""

from typing import Any, Protocol

STEP_LIMIT = "pdserve_step_limit_s"
"""The key in `extra_args`: how many seconds a step may take that reads of this prompt and also
writes answers."""

LEAST_PIECE = 64
"""Tokens. A prompt that is being read gets so many in every step, also where the answers alone take
longer than the limit. No piece pays a whole step's overhead for less."""


IDLE_FACTOR = 4
"""A step in which no answer waits may take so many times the limit: one may come meanwhile, whose
KV is handed over, and waits for its end."""


class _HasExtraArgs(Protocol):
    extra_args: dict[str, Any] | None


def step_limit_s(params: _HasExtraArgs | None) -> float | None:
    """The limit that a request brings with it; None where there is none."""
    if params is None or not params.extra_args:
        return None
    limit_s: float | None = params.extra_args.get(STEP_LIMIT)
    return limit_s


def next_piece(
    piece: float, *, limit_s: float, seconds: float, num_prefill_tokens: int, most: int
) -> float:
    """How many prompt tokens the next step may read, of all prompts together.

    A step takes a time of its own and for its answers, and more for each token that it reads. So
    what a step read, times limit_s / seconds, is too little to overrun the limit if it was in time,
    and still enough to overrun it if it was not: the piece rises to the one or falls to the other.
    That holds whatever the step read. The last tokens of a prompt lift nothing, and where steps are
    scheduled ahead, a step with the piece of before says nothing twice. A piece changes at most by
    a factor of 2: what one stalled step takes away, the next one in time gives back.

    Args:
        piece: what steps may read now.
        seconds: that the last step took.
        num_prefill_tokens: that it read.
        most: the engine's own limit for a step.
    """
    if num_prefill_tokens:
        fits = num_prefill_tokens * limit_s / seconds
        if seconds <= limit_s:
            piece = max(piece, min(fits, 2 * piece))
        else:
            piece = min(piece, max(fits, piece / 2))
    return min(max(piece, LEAST_PIECE), most)


def num_at_once(piece: float) -> int:
    """How many prompts may share a piece."""
    return max(1, int(piece) // LEAST_PIECE)


def share_of_one(piece: float, num_prompts: int) -> int:
    """What each of the prompts may have that a step reads."""
    return max(int(piece) // max(1, num_prompts), min(int(piece), LEAST_PIECE))
