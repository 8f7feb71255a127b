"""The plan: what both pools need, what limits and budget leave of it, and when to act. Pure."""

from dataclasses import dataclass, replace

from cluster.scaling.budget import share_budget
from cluster.scaling.demand_forecast import start_seconds
from cluster.scaling.learned_state import (
    CORRECTION_WINDOW_S,
    correct,
    is_missed,
    measured,
    note_forecast,
    record_decision,
    remember,
)
from cluster.scaling.need import Need
from cluster.scaling.sizing import size_decode, size_prefill
from cluster.scaling.snapshot import (
    Attainment,
    LearnedState,
    PoolCounts,
    PoolLimits,
    PoolPlan,
    ScalePlan,
    ScaleSettings,
    ScaleSnapshot,
    ScaleState,
)
from engine.lateness import PUT_BACK_S

HELD_BY_REPORTS = "no router has reported"
HELD_BY_BUDGET = "gpu_budget"
HELD_BY_MISSES = "the target is missed as it is"


def plan_scale(snapshot: ScaleSnapshot, settings: ScaleSettings, state: ScaleState) -> ScalePlan:
    """Both pools' targets, with reasons, and the state for the next call.

    A pool grows at once (after `up_delay_s`) to what it needs; it shrinks to what would have held
    the targets over the whole look-back with half the misses, after `down_delay_s`. The two bars
    keep it still under a constant load. Without a report nothing shrinks. A load that comes back
    periodically (cluster.scaling.season) is grown for in time, and its falls wait for no delay.
    """
    now_s = snapshot.now_s
    elapsed_s = 0.0 if state.reported_s is None else now_s - state.reported_s
    state = remember(state, snapshot, settings)
    is_idle = _is_idle(snapshot, settings, state)
    has_report = snapshot.traffic is not None
    pools = _pools(snapshot, settings, state)
    wishes = [_wish(pool, is_idle=is_idle) for pool in pools]
    timed = [
        _in_time(pool, wish, now_s, settings, has_report=has_report)
        for pool, wish in zip(pools, wishes, strict=True)
    ]
    targets = _within_budget(pools, timed, settings)
    plans, learned_states = [], []
    for pool, wish, (learned, wanted, held_by), target in zip(
        pools, wishes, timed, targets, strict=True
    ):
        plans.append(
            PoolPlan(
                target=target,
                needed=wish.needed,
                reason=wish.reason,
                held_by=HELD_BY_BUDGET if target < wanted else held_by or wish.held_by,
                inputs=pool.need.inputs + _share_met(pool.attained),
            )
        )
        learned = _learned(
            replace(pool, learned=learned), wish, settings, now_s, elapsed_s=elapsed_s
        )
        learned_states.append(
            record_decision(
                learned,
                target,
                now_s,
                regret_s=settings.look_back_s,
                is_predicted=pool.need.is_predicted,
            )
        )
    return ScalePlan(
        prefill=plans[0],
        decode=plans[1],
        state=replace(state, prefill=learned_states[0], decode=learned_states[1]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pool:
    """All that is known of one pool."""

    need: Need
    counts: PoolCounts
    limits: PoolLimits
    learned: LearnedState
    attained: Attainment
    echo_s: float = 0.0
    """For how long requests that came while it had too little are measured after that."""

    @property
    def current(self) -> int:
        """What was decided last; what there is where nothing was."""
        if self.learned.target is not None:
            return self.learned.target
        return self.counts.num_ready + self.counts.num_starting


def _pools(
    snapshot: ScaleSnapshot, settings: ScaleSettings, state: ScaleState
) -> tuple[_Pool, _Pool]:
    prefill_need = size_prefill(snapshot, settings, state)
    return (
        _Pool(
            need=prefill_need,
            counts=snapshot.prefill,
            limits=settings.prefill,
            learned=state.prefill,
            attained=measured(state.history, "ttft"),
            echo_s=PUT_BACK_S,
        ),
        _Pool(
            need=size_decode(snapshot, settings, state, prefill_need=prefill_need),
            counts=snapshot.decode,
            limits=settings.decode,
            learned=state.decode,
            attained=measured(state.history, "itl"),
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wish:
    """What a pool would have if nothing had to wait: `grow_to` at least, `shrink_to` at most."""

    needed: int
    grow_to: int
    shrink_to: int
    reason: str
    held_by: str | None = None


def _is_idle(snapshot: ScaleSnapshot, settings: ScaleSettings, state: ScaleState) -> bool:
    load = snapshot.load
    if load.prefill_backlog_s > 0 or load.num_decoding > 0 or state.last_arrival_s is None:
        return load.prefill_backlog_s == 0 and load.num_decoding == 0
    return snapshot.now_s - state.last_arrival_s >= settings.idle_s


def _wish(pool: _Pool, *, is_idle: bool) -> _Wish:
    limits = pool.limits
    if limits.min_replicas == limits.max_replicas:
        fixed = limits.max_replicas
        return _Wish(
            needed=pool.need.replicas, grow_to=fixed, shrink_to=fixed, reason="a fixed size"
        )
    if is_idle:
        least = limits.min_replicas
        return _Wish(needed=0, grow_to=least, shrink_to=least, reason="no requests")
    needed = max(1, pool.need.replicas)
    enough = max(needed, pool.need.enough)

    def bounded(replicas: int) -> int:
        return min(limits.max_replicas, max(limits.min_replicas, replicas))

    return _Wish(
        needed=needed,
        grow_to=bounded(needed + limits.warm_replicas),
        shrink_to=bounded(enough + limits.warm_replicas),
        reason=pool.need.reason,
        held_by="max_replicas" if needed > limits.max_replicas else None,
    )


def _in_time(
    pool: _Pool, wish: _Wish, now_s: float, settings: ScaleSettings, *, has_report: bool
) -> tuple[LearnedState, int, str | None]:
    """The state with how long it has been so, the target after delays, and what held it."""
    learned, current = pool.learned, pool.current
    if wish.grow_to > current:
        since_s = now_s if learned.wants_more_since_s is None else learned.wants_more_since_s
        learned = replace(learned, wants_more_since_s=since_s, fewer_do_since_s=None)
        # A pool without replicas makes requests wait: the delay is for pools that serve.
        if current > 0 and now_s - since_s < settings.up_delay_s:
            return learned, current, "up_delay_s"
        return learned, wish.grow_to, None
    learned = replace(learned, wants_more_since_s=None)
    if wish.shrink_to >= current:
        return replace(learned, fewer_do_since_s=None), current, None
    share = settings.targets.share * pool.need.attainable
    held_by = None
    if not has_report:
        held_by = HELD_BY_REPORTS
    elif (
        is_missed(pool.attained, share) and wish.needed > 0 and not _is_catching_up(learned, now_s)
    ):
        held_by = HELD_BY_MISSES
    if held_by is not None:
        return replace(learned, fewer_do_since_s=None), current, held_by
    if pool.need.is_predicted:
        return learned, wish.shrink_to, None
    since_s = now_s if learned.fewer_do_since_s is None else learned.fewer_do_since_s
    learned = replace(learned, fewer_do_since_s=since_s)
    # What was started last must have been there for a while before it can be too much.
    settled_s = _settled_s(learned, settings)
    calm_s = now_s - (since_s if settled_s is None else max(since_s, settled_s))
    # What was regretted is one or two too few, not to have let go of most of an idle pool.
    factor = learned.down_factor if 2 * wish.shrink_to > current else 1.0
    if calm_s < settings.down_delay_s * factor:
        return learned, current, "down_delay_s"
    return learned, wish.shrink_to, None


def _within_budget(
    pools: tuple[_Pool, _Pool],
    timed: list[tuple[LearnedState, int, str | None]],
    settings: ScaleSettings,
) -> tuple[int, int]:
    """The targets within the budget. GPUs that still drain delay starts, never end replicas."""
    draining = sum(pool.counts.num_draining * pool.limits.gpus_per_replica for pool in pools)
    wanted = (timed[0][1], timed[1][1])
    limits = (settings.prefill, settings.decode)
    shared = share_budget(wanted, limits, settings.gpu_budget)
    if settings.gpu_budget is None or draining == 0:
        return shared
    now = share_budget(shared, limits, settings.gpu_budget - draining)
    return (
        max(now[0], min(pools[0].current, shared[0])),
        max(now[1], min(pools[1].current, shared[1])),
    )


def _learned(
    pool: _Pool, wish: _Wish, settings: ScaleSettings, now_s: float, *, elapsed_s: float
) -> LearnedState:
    """The state with this snapshot's forecast, and with what the misses say of the prediction."""
    learned = pool.learned
    since_s = _steady_since_s(pool, wish, now_s)
    correction = correct(
        learned.correction,
        pool.attained,
        share=settings.targets.share * pool.need.attainable,
        elapsed_s=elapsed_s,
        is_steady=since_s is not None and now_s - since_s > CORRECTION_WINDOW_S,
        is_ample=pool.need.is_ample,
    )
    return note_forecast(
        replace(learned, correction=correction, steady_since_s=since_s),
        pool.need.forecast,
        now_s,
        keep_s=settings.look_back_s + 2 * start_seconds(learned, settings),
    )


def _steady_since_s(pool: _Pool, wish: _Wish, now_s: float) -> float | None:
    """From when on what is measured of the pool was served by what was predicted to be enough."""
    is_steady = (
        pool.counts.num_starting == 0
        and pool.counts.num_ready >= wish.needed
        and not pool.need.is_behind
    )
    if not is_steady:
        return None
    since_s = pool.learned.steady_since_s
    return now_s + pool.echo_s if since_s is None else since_s


def _is_catching_up(learned: LearnedState, now_s: float) -> bool:
    """Whether what is measured may be of prompts that came before the pool had enough."""
    since_s = learned.steady_since_s
    return since_s is not None and now_s - since_s <= CORRECTION_WINDOW_S


def _settled_s(learned: LearnedState, settings: ScaleSettings) -> float | None:
    """From when on the pool has what was decided last; None where nothing was."""
    if learned.changed_s is None or learned.shrunk_s == learned.changed_s:
        return learned.changed_s
    return learned.changed_s + start_seconds(learned, settings)


def _share_met(attained: Attainment) -> tuple[tuple[str, float], ...]:
    return (("share_met", attained.num_met / attained.num),) if attained.num else ()
