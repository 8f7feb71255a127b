"""Prompts that are read beside answers: in pieces, so that steps take no longer than asked. Pure.

A router that has a long prompt read by an engine which writes answers says how long a step may take
then. How much of a prompt that is, the engine finds by trial: it holds for whatever else is in its
steps, and needs no cost model. Who cuts the pieces is `engine.lanes`.
"""

from collections.abc import Mapping
from typing import Any

STEP_LIMIT = "pdserve_step_limit_s"
"""The key in `SamplingParams.extra_args`."""

FIRST_PIECE = 256
"""Tokens, before anything was tried."""

LEAST_PIECE = 16
"""Tokens: a prompt goes on even where the answers alone take longer than the limit."""


def step_limit_s(extra_args: Mapping[str, Any] | None) -> float | None:
    """How long a step may take that reads some of this request's prompt beside answers."""
    return (extra_args or {}).get(STEP_LIMIT)


def next_piece(piece: int, *, num_read: int, seconds: float, limit_s: float, most: int) -> int:
    """How many tokens to read in a step like the last one, so that it takes `limit_s`.

    At most half or twice as many as before, so that a step that stalled does no harm for long. Where
    fewer were read than might have been, a short step is no reason to read more.

    Args:
        piece: tokens that might have been read in the last step.
        num_read: tokens that were.
        seconds: that it took.
        most: tokens that fit in any step.
    """
    ratio = min(2.0, max(0.5, limit_s / seconds))
    following = round(piece * ratio) if ratio < 1 else max(piece, round(num_read * ratio))
    return max(LEAST_PIECE, min(most, following))
