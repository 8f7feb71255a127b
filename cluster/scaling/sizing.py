"""Puts the phases' models together: each pool's need in a snapshot. Pure."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from cluster.scaling import decode, prefill
from cluster.scaling.demand_forecast import forecast_demand, start_seconds
from cluster.scaling.forecast import prefill_work, requests
from cluster.scaling.history import RECENT_S, Demand, latest
from cluster.scaling.need import CORRECTION_MAX, MARGIN, Need, largest, min_replicas_for, stricter
from cluster.scaling.snapshot import (
    Engines,
    LearnedState,
    PoolCounts,
    ScaleSettings,
    ScaleSnapshot,
    ScaleState,
)

DRAIN_STARTS = 2.0
"""Starts' times in which prompts that an overload left waiting are to be drained. They are late
whatever is done, and give way to those that are not (`engine.lateness`), so replicas of their own
would soon be there for nobody. But they give way once: what is left of them by then goes before new
prompts."""


def size_prefill(snapshot: ScaleSnapshot, settings: ScaleSettings, state: ScaleState) -> Need:
    """What the TTFT target asks of the prefill pool."""
    learned, share = state.prefill, settings.targets.share
    patience_s = max(1e-3, settings.targets.slo.ttft_s - snapshot.engines.overhead_s)
    start_s = start_seconds(learned, settings)
    seen = forecast_demand(state, learned, prefill_work, settings, now_s=snapshot.now_s)
    now, past = (_corrected(each, learned.correction) for each in (seen.now, seen.past))
    backlog_s = snapshot.load.prefill_backlog_s * learned.correction
    load = now.rate * now.prefill_s
    # A season's load is that of later: until then comes what comes now.
    late_s = prefill.late_backlog(
        backlog_s,
        min(load, seen.forecast * learned.correction),
        _coming(snapshot.prefill),
        start_s=start_s,
    )

    def replayed(n: int, *, margin: float = 1.0) -> float:
        return prefill.replay_share(
            state.history,
            seen.loads,
            past,
            n,
            patience_s=patience_s,
            correction=margin * learned.correction,
        )

    def steadily(n: int, *, margin: float = 1.0, rate: float = now.rate) -> float:
        return prefill.steady_share(replace(now, rate=margin * rate), n, patience_s=patience_s)

    replicas_for = partial(
        min_replicas_for, most=settings.prefill.max_replicas, around=learned.target or 0
    )
    needed, reason = largest(
        (
            (replicas_for(steadily, share), "prompts that arrive now"),
            (replicas_for(replayed, share), "prompts of the look-back"),
            (
                _late_prompts(load, late_s, max(patience_s, DRAIN_STARTS * start_s)),
                "prompts that wait longer than a start takes",
            ),
        )
    )
    return Need(
        replicas=needed,
        reason=reason,
        enough=_enough(needed, replicas_for, steadily, replayed, share, seen.likely_rate),
        attainable=prefill.attainable_share(past, patience_s),
        is_behind=backlog_s > snapshot.prefill.num_ready * patience_s,
        is_ample=steadily(snapshot.prefill.num_ready, margin=CORRECTION_MAX / learned.correction)
        >= share,
        forecast=seen.forecast,
        is_predicted=seen.season is not None,
        inputs=(
            ("requests_per_s", now.rate),
            ("prefill_s", now.prefill_s),
            ("backlog_s", backlog_s),
            ("late_backlog_s", late_s),
            ("start_s", start_s),
            ("correction", learned.correction),
            *seen.season_input,
        ),
    )


def size_decode(
    snapshot: ScaleSnapshot, settings: ScaleSettings, state: ScaleState, *, prefill_need: Need
) -> Need:
    """What the ITL target and the KV cache ask of the decode pool."""
    learned, share = state.decode, settings.targets.share
    start_s = start_seconds(learned, settings)
    seen = forecast_demand(state, learned, requests, settings, now_s=snapshot.now_s)
    now, until_start = _handed_over(
        seen.now,
        snapshot.prefill,
        prefill_need,
        most=settings.prefill.max_replicas,
        correction=state.prefill.correction,
    )
    until_start = replace(until_start, rate=min(until_start.rate, seen.forecast))
    past_model = _decode_model(snapshot.engines, settings, learned, seen.past)
    model = past_model
    if now.prompt_tokens:
        model = _decode_model(snapshot.engines, settings, learned, now)
    tokens = max(now.output_tokens, _tokens_under_way(snapshot, state, model, start_s))
    now, until_start = (replace(each, output_tokens=tokens) for each in (now, until_start))

    def replayed(n: int, *, margin: float = 1.0) -> float:
        loads = [margin * each for each in seen.loads]
        return decode.replay_share(state.history, loads, seen.past, past_model, n, share=share)

    def steadily(n: int, *, margin: float = 1.0, rate: float = now.rate) -> float:
        return decode.steady_share(replace(now, rate=margin * rate), model, n)

    replicas_for = partial(
        min_replicas_for, most=settings.decode.max_replicas, around=learned.target or 0
    )
    bound = "the KV cache" if model.max_batch < model.itl_batch else "ITL"
    needed, reason = largest(
        (
            (replicas_for(steadily, share), f"answers that begin now, by {bound}"),
            (replicas_for(replayed, share), f"answers of the look-back, by {bound}"),
            (
                _late_answers(snapshot, until_start, model, start_s),
                "answers that wait longer than a start takes",
            ),
        )
    )
    return Need(
        replicas=needed,
        reason=reason,
        enough=_enough(needed, replicas_for, steadily, replayed, share, seen.likely_rate),
        attainable=1.0 if model.step_s(1) <= settings.targets.slo.itl_s else 0.0,
        is_behind=snapshot.load.num_decoding > snapshot.decode.num_ready * model.max_batch,
        is_ample=snapshot.load.num_decoding
        <= snapshot.decode.num_ready * replace(model, correction=CORRECTION_MAX).max_batch,
        forecast=seen.forecast,
        is_predicted=seen.season is not None,
        inputs=(
            ("requests_per_s", now.rate),
            ("output_tokens", now.output_tokens),
            ("context_tokens", now.context_tokens),
            ("num_decoding", float(snapshot.load.num_decoding)),
            ("most_per_replica", float(model.max_batch)),
            ("start_s", start_s),
            ("correction", learned.correction),
            *seen.season_input,
        ),
    )


def _enough(
    needed: int,
    replicas_for: Callable[[Callable[[int], float], float], int],
    steadily: Callable[..., float],
    replayed: Callable[..., float],
    share: float,
    likely_rate: float,
) -> int:
    """The fewest that hold a tenth more with half the misses."""
    return max(
        needed,
        replicas_for(partial(steadily, margin=MARGIN), stricter(share)),
        replicas_for(partial(steadily, margin=MARGIN, rate=likely_rate), stricter(share)),
        replicas_for(partial(replayed, margin=MARGIN), stricter(share)),
    )


def _handed_over(
    now: Demand, prefill_counts: PoolCounts, prefill_need: Need, *, most: int, correction: float
) -> tuple[Demand, Demand]:
    """What decode gets once what starts now is ready, and what until then.

    Prompts that wait for prefill reach decode as fast as the replicas there, `most` of them, can
    read them.
    """
    if not (prefill_need.is_behind and now.prefill_s):
        return now, now
    prompt_s = now.prefill_s * correction
    num_reading = max(min(prefill_need.replicas, most), _coming(prefill_counts))
    return (
        replace(now, rate=max(now.rate, num_reading / prompt_s)),
        replace(now, rate=min(now.rate, prefill_counts.num_ready / prompt_s)),
    )


def _decode_model(
    engines: Engines, settings: ScaleSettings, learned: LearnedState, demand: Demand
) -> decode.DecodeModel:
    return decode.DecodeModel(
        engines=engines,
        context_tokens=demand.context_tokens,
        itl_s=settings.targets.slo.itl_s,
        correction=learned.correction,
    )


def _late_prompts(load: float, late_s: float, drain_s: float) -> int:
    """Replicas that drain in `drain_s` what ready ones cannot."""
    return math.ceil(load + late_s / drain_s) if late_s > 0 else 0


def _tokens_under_way(
    snapshot: ScaleSnapshot, state: ScaleState, model: decode.DecodeModel, start_s: float
) -> float:
    """Tokens that answers have at least, where replicas have been full of them for a while; else 0.

    Only answers that have ended tell their length, so longer ones are heard of late. Meanwhile
    replicas that are as many as before, and full, have written tokens at every step, for no more
    answers than have ended or are in the batch.
    """
    recent = latest(state.history, RECENT_S)
    duration_s = sum(each.duration_s for each in recent)
    changed_s = state.decode.changed_s
    if changed_s is not None and snapshot.now_s - changed_s < start_s + duration_s:
        return 0.0
    num_ended = sum(each.num_ended for each in recent)
    num_now = snapshot.load.num_decoding
    num_before = num_now + num_ended - sum(each.num_arrivals for each in recent)
    num_ready = snapshot.decode.num_ready
    if not num_ready or min(num_now, num_before) < num_ready * model.max_batch:
        return 0.0
    batch = min(num_now / num_ready, snapshot.engines.max_batch)
    num_written = num_ready * batch * duration_s / model.step_s(batch)
    return num_written / (num_ended + num_ready * batch)


def _late_answers(
    snapshot: ScaleSnapshot, now: Demand, model: decode.DecodeModel, start_s: float
) -> int:
    """Replicas that clear within a start time what will still wait then: late or not, all answers
    share the steps."""
    late = decode.late_requests(
        snapshot.load.num_decoding, now, model, _coming(snapshot.decode), start_s=start_s
    )
    if late <= 0:
        return 0
    life_s = now.output_tokens * model.step_s(model.max_batch)
    late_part = late * min(1.0, life_s / start_s) if start_s else late
    return math.ceil((now.rate * life_s + late_part) / model.max_batch)


def _corrected(demand: Demand, correction: float) -> Demand:
    return replace(demand, prefill_s=demand.prefill_s * correction)


def _coming(counts: PoolCounts) -> int:
    """What there will be without a further decision."""
    return counts.num_ready + counts.num_starting
