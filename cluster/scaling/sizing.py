"""Puts the phases' models together: each pool's need in a snapshot. Pure."""

import math
from dataclasses import replace
from functools import partial

from cluster.scaling import decode, prefill
from cluster.scaling.history import (
    RECENT_S,
    Demand,
    certain_rate,
    forecast_growth,
    latest,
    measure_demand,
    recent_rate,
)
from cluster.scaling.need import MARGIN, Need, fewest, largest, stricter
from cluster.scaling.snapshot import (
    PoolCounts,
    PoolMemory,
    ScaleSettings,
    ScaleSnapshot,
    ScaleState,
)


def start_seconds(memory: PoolMemory, settings: ScaleSettings) -> float:
    """How long a start takes: as seen, or as configured until one was seen."""
    return settings.expected_start_s if memory.start_s is None else memory.start_s


def size_prefill(snapshot: ScaleSnapshot, settings: ScaleSettings, state: ScaleState) -> Need:
    """What the TTFT target asks of the prefill pool."""
    limits, memory, share = settings.prefill, state.prefill, settings.targets.share
    start_s = start_seconds(memory, settings)
    patience_s = max(1e-3, settings.targets.ttft_s - snapshot.engines.overhead_s)
    now = _corrected(_present(state, start_s), memory.correction)
    past = _corrected(
        measure_demand(state.history, output_tokens=state.output_tokens), memory.correction
    )
    most, likely = limits.max_replicas, max(now.rate, recent_rate(state.history))
    backlog_s = snapshot.load.prefill_backlog_s * memory.correction
    load = now.rate * now.prefill_s
    late_s = prefill.late_backlog(backlog_s, load, _coming(snapshot.prefill), start_s=start_s)
    # A backlog that ready replicas cannot clear is drained within the target, or within a start
    # time if that is longer: replicas for less would be gone before they have paid.
    drain_s = max(patience_s, start_s)

    def replayed(n: int, *, margin: float = 1.0) -> float:
        return prefill.replay_share(
            state.history, past, n, patience_s=patience_s, correction=margin * memory.correction
        )

    def steadily(n: int, *, rate: float) -> float:
        return prefill.steady_share(replace(now, rate=rate), n, patience_s=patience_s)

    fewest_for = partial(fewest, most=most, around=memory.target or 0)

    backlog_n = math.ceil(load + late_s / drain_s) if late_s > 0 else 0
    needed, reason = largest(
        (
            (fewest_for(partial(steadily, rate=now.rate), share), "prompts that arrive now"),
            (fewest_for(replayed, share), "prompts of the look-back"),
            (backlog_n, "prompts that wait longer than a start takes"),
        )
    )
    enough = max(
        needed,
        fewest_for(partial(steadily, rate=MARGIN * likely), stricter(share)),
        fewest_for(partial(replayed, margin=MARGIN), stricter(share)),
    )
    return Need(
        replicas=needed,
        reason=reason,
        enough=enough,
        attainable=prefill.attainable_share(past, patience_s),
        inputs=(
            ("requests_per_s", now.rate),
            ("prefill_s", now.prefill_s),
            ("backlog_s", backlog_s),
            ("late_backlog_s", late_s),
            ("start_s", start_s),
            ("correction", memory.correction),
        ),
    )


def size_decode(snapshot: ScaleSnapshot, settings: ScaleSettings, state: ScaleState) -> Need:
    """What the ITL target and the KV cache ask of the decode pool."""
    limits, memory, share = settings.decode, state.decode, settings.targets.share
    start_s = start_seconds(memory, settings)
    now = _present(state, start_s)
    past = measure_demand(state.history, output_tokens=state.output_tokens)

    def model_of(demand: Demand) -> decode.DecodeModel:
        return decode.DecodeModel(
            engines=snapshot.engines,
            context_tokens=demand.context_tokens,
            itl_s=settings.targets.itl_s,
            correction=memory.correction,
        )

    model, past_model = model_of(now if now.prompt_tokens else past), model_of(past)
    most, likely = limits.max_replicas, max(now.rate, recent_rate(state.history))
    late = decode.late_requests(
        snapshot.load.num_decoding, now, model, _coming(snapshot.decode), start_s=start_s
    )

    def replayed(n: int, *, margin: float = 1.0) -> float:
        return decode.replay_share(state.history, past, past_model, n, share=share, load=margin)

    def steadily(n: int, *, rate: float) -> float:
        return decode.steady_share(replace(now, rate=rate), model, n)

    fewest_for = partial(fewest, most=most, around=memory.target or 0)

    life_s = now.output_tokens * model.step_s(model.max_batch)
    late_part = late * min(1.0, life_s / start_s) if start_s else late
    late_n = math.ceil((now.rate * life_s + late_part) / model.max_batch) if late > 0 else 0
    bound = "the KV cache" if model.max_batch < model.itl_batch else "ITL"
    needed, reason = largest(
        (
            (
                fewest_for(partial(steadily, rate=now.rate), share),
                f"answers that begin now, by {bound}",
            ),
            (fewest_for(replayed, share), f"answers of the look-back, by {bound}"),
            (late_n, "answers that wait longer than a start takes"),
        )
    )
    enough = max(
        needed,
        fewest_for(partial(steadily, rate=MARGIN * likely), stricter(share)),
        fewest_for(partial(replayed, margin=MARGIN), stricter(share)),
    )
    return Need(
        replicas=needed,
        reason=reason,
        enough=enough,
        attainable=1.0 if model.step_s(1) <= settings.targets.itl_s else 0.0,
        inputs=(
            ("requests_per_s", now.rate),
            ("output_tokens", now.output_tokens),
            ("context_tokens", now.context_tokens),
            ("num_decoding", float(snapshot.load.num_decoding)),
            ("most_per_replica", float(model.max_batch)),
            ("start_s", start_s),
            ("correction", memory.correction),
        ),
    )


def _present(state: ScaleState, start_s: float) -> Demand:
    """The demand that a replica started now will meet: what is certain now, and its trend."""
    recent = latest(state.history, max(RECENT_S, 2 * start_s))
    demand = measure_demand(recent, output_tokens=state.output_tokens)
    return replace(demand, rate=certain_rate(state.history) * forecast_growth(recent, start_s))


def _corrected(demand: Demand, correction: float) -> Demand:
    return replace(demand, prefill_s=demand.prefill_s * correction)


def _coming(counts: PoolCounts) -> int:
    """What there will be without a further decision."""
    return counts.num_ready + counts.num_starting
