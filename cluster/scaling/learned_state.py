"""What is learned from one snapshot to the next: start times, answer lengths, corrections. Pure."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from cluster.scaling.history import latest
from cluster.scaling.need import CORRECTION_MAX
from cluster.scaling.snapshot import (
    Attainment,
    LearnedState,
    PoolCounts,
    ScaleSettings,
    ScaleSnapshot,
    ScaleState,
    Traffic,
)

START_WEIGHT = 0.3
"""Of a new start time in the moving mean."""

OUTPUT_WINDOW = 500
"""Answers that the moving mean of their lengths remembers."""

CORRECTION_WINDOW_S = 60.0
CORRECTION_DECAY_S = 600.0
CORRECTION_MIN_SAMPLES = 30

SEASON_LOOK_BACKS = 2.0
"""Look-backs that are remembered: two periods as long as one, or more that are shorter."""

MAX_DOWN_FACTOR = 8.0
"""By which regret makes `down_delay_s` longer."""


def remember(state: ScaleState, snapshot: ScaleSnapshot, settings: ScaleSettings) -> ScaleState:
    """The state with what the snapshot adds."""
    traffic = snapshot.traffic or ()
    output_tokens = state.output_tokens
    for each in traffic:
        if each.num_ended:
            mean = each.num_output_tokens / each.num_ended
            weight = 1 - (1 - 1 / OUTPUT_WINDOW) ** each.num_ended
            output_tokens = (
                mean if output_tokens is None else output_tokens + weight * (mean - output_tokens)
            )
    arrived = any(each.num_arrivals for each in traffic)
    all_traffic = (*state.older, *state.history, *traffic)
    history = latest(all_traffic, settings.look_back_s)
    older = latest(all_traffic, SEASON_LOOK_BACKS * settings.look_back_s)[: -len(history) or None]
    return ScaleState(
        history=history,
        older=older,
        output_tokens=output_tokens,
        last_arrival_s=snapshot.now_s if arrived else state.last_arrival_s,
        reported_s=snapshot.now_s if snapshot.traffic is not None else state.reported_s,
        prefill=_count_starts(state.prefill, snapshot.prefill, snapshot.now_s),
        decode=_count_starts(state.decode, snapshot.decode, snapshot.now_s),
    )


def _count_starts(learned: LearnedState, counts: PoolCounts, now_s: float) -> LearnedState:
    since = learned.starting_since_s
    num_ready = max(0, counts.num_ready - learned.num_ready)
    start_s = learned.start_s
    for asked_s in since[:num_ready]:
        took_s = now_s - asked_s
        start_s = took_s if start_s is None else start_s + START_WEIGHT * (took_s - start_s)
    since = since[num_ready:]
    # Starts that were called off end with the one that was asked for last.
    since = since[: counts.num_starting]
    since += (now_s,) * (counts.num_starting - len(since))
    return replace(learned, num_ready=counts.num_ready, starting_since_s=since, start_s=start_s)


def note_forecast(
    learned: LearnedState, load: float, now_s: float, *, keep_s: float
) -> LearnedState:
    """The state with what was forecast now, without what is older than `keep_s`."""
    first = bisect_left(learned.forecasts, now_s - keep_s, key=lambda each: each[0])
    return replace(learned, forecasts=(*learned.forecasts[first:], (now_s, load)))


def measured(history: Sequence[Traffic], target: Literal["ttft", "itl"]) -> Attainment:
    """What was measured against a target over the last minute."""
    samples = [
        each.ttft if target == "ttft" else each.itl for each in latest(history, CORRECTION_WINDOW_S)
    ]
    return Attainment(
        num=sum(each.num for each in samples), num_met=sum(each.num_met for each in samples)
    )


def is_missed(attained: Attainment, share: float) -> bool:
    """Whether clearly fewer than `share` met the target: by more than a standard error."""
    if attained.num < CORRECTION_MIN_SAMPLES:
        return False
    noise = math.sqrt(share * (1 - share) / attained.num)
    return attained.num_met / attained.num < share - noise


def correct(
    correction: float,
    attained: Attainment,
    *,
    share: float,
    elapsed_s: float,
    is_steady: bool,
    is_ample: bool,
) -> float:
    """The next correction of the predicted work, within [1, CORRECTION_MAX].

    It grows while fewer requests than `share` meet the target although the pool has had what was
    predicted to be enough (`is_steady`), and falls back slowly while clearly more do. Where the
    pool was not steady, misses say nothing about the prediction; where it would do with any
    correction (`is_ample`), they have another cause.
    """
    if not is_steady or attained.num < CORRECTION_MIN_SAMPLES:
        return correction
    met = attained.num_met / attained.num
    if is_missed(attained, share):
        if is_ample:
            return correction
        missing = min(1.0, (share - met) / (1 - share))
        grown = correction * (1 + 0.5 * missing * elapsed_s / CORRECTION_WINDOW_S)
        return min(CORRECTION_MAX, grown)
    if met > (1 + share) / 2:
        return 1 + (correction - 1) * math.exp(-elapsed_s / CORRECTION_DECAY_S)
    return correction


def record_decision(
    learned: LearnedState, target: int, now_s: float, *, regret_s: float, is_predicted: bool
) -> LearnedState:
    """The state after `target` was decided.

    A pool that grows within `regret_s` of having shrunk regrets it: each time it waits twice as
    long before it shrinks again. A shrinking that lasted halves that. What a season predicted is no
    surprise, so no regret.
    """
    if target == learned.target:
        return learned
    factor, shrunk_s = learned.down_factor, learned.shrunk_s
    if learned.target is not None and target < learned.target:
        if shrunk_s is not None and now_s - shrunk_s > 2 * regret_s:
            factor = max(1.0, factor / 2)
        shrunk_s = now_s
    elif shrunk_s is not None and now_s - shrunk_s < regret_s and not is_predicted:
        factor, shrunk_s = min(MAX_DOWN_FACTOR, 2 * factor), None
    return replace(
        learned,
        target=target,
        changed_s=now_s,
        wants_more_since_s=None,
        fewer_do_since_s=None,
        shrunk_s=shrunk_s,
        down_factor=factor,
    )
