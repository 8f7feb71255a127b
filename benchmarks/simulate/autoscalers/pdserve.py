"""Our autoscaler in the simulator: `cluster.scaling.plan_scale`, fed with what it has seen."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.simulate.model.fleet import FleetSpec
from benchmarks.simulate.model.history import Observation, PoolView, Series
from benchmarks.simulate.model.scaled_run import FleetSize
from cluster.scaling import (
    Attainment,
    Engines,
    Load,
    PoolCounts,
    PoolLimits,
    ScalePlan,
    ScaleSettings,
    ScaleSnapshot,
    ScaleState,
    Targets,
    Traffic,
    plan_scale,
)
from cluster.sections import ScalingConfig
from router.slo import Slo

BUCKET_S = 2.0
SHARE = 0.995
"""Of the requests that are to meet each target, so that at least 99 % meet both."""


@dataclass(slots=True)
class _Bucket:
    num_arrivals: int = 0
    num_prompt_tokens: int = 0
    prefill_s: float = 0.0
    prefill_squared_s2: float = 0.0
    num_ended: int = 0
    num_output_tokens: int = 0
    num_first_tokens: int = 0
    num_in_time: int = 0
    num_answers: int = 0
    num_fast: int = 0


class _Reader:
    """Where in a growing series one has read to."""

    def __init__(self, series: Callable[[Observation], Series]) -> None:
        self._series = series
        self._next = 0

    def new(self, seen: Observation) -> list[tuple[float, float]]:
        series = self._series(seen)
        start, self._next = self._next, len(series.values)
        return list(zip(series.times_s[start:], series.values[start:], strict=True))


class PdserveAutoscaler:
    """Owns the plan's state and the readers of what routers would report."""

    def __init__(
        self,
        spec: FleetSpec,
        slo: Slo,
        *,
        gpu_budget: int,
        period_s: float = ScalingConfig().interval_s,
    ) -> None:
        assert spec.decode is not None
        self.period_s = period_s
        self.last_plan: ScalePlan | None = None
        self._slo = slo
        self._settings = ScaleSettings(
            targets=Targets(slo=slo, share=SHARE),
            prefill=PoolLimits(
                max_replicas=gpu_budget // spec.prefill.gpus, gpus_per_replica=spec.prefill.gpus
            ),
            decode=PoolLimits(
                max_replicas=gpu_budget // spec.decode.gpus, gpus_per_replica=spec.decode.gpus
            ),
            gpu_budget=gpu_budget,
            expected_start_s=spec.prefill.start_s,
        )
        self._engines = Engines(
            decode=_StepCost(spec),
            num_kv_tokens=spec.decode.kv_capacity_tokens,
            max_batch=spec.decode.max_num_seqs,
            overhead_s=spec.edge_s + spec.prefill.overhead_s + spec.prefill.prefill_overhead_s,
        )
        self._state = ScaleState()
        self._since_s = 0.0
        self._arrivals = _Reader(lambda seen: seen.history.prompt_tokens)
        self._prompts = _Reader(lambda seen: seen.history.prefill_s)
        self._ends = _Reader(lambda seen: seen.history.output_tokens)
        self._ttfts = _Reader(lambda seen: seen.history.ttfts_s)
        self._tpots = _Reader(lambda seen: seen.history.tpots_s)

    def plan(self, seen: Observation) -> FleetSize:
        snapshot = ScaleSnapshot(
            now_s=seen.now_s,
            traffic=self._traffic(seen),
            load=Load(
                prefill_backlog_s=seen.prefill_backlog_s,
                num_decoding=seen.num_decoding,
                kv_usage_fraction=_kv_usage(seen.decode),
            ),
            prefill=_counts(seen.prefill),
            decode=_counts(seen.decode),
            engines=self._engines,
        )
        self.last_plan = plan_scale(snapshot, self._settings, self._state)
        self._state = self.last_plan.state
        return FleetSize(self.last_plan.prefill.target, self.last_plan.decode.target)

    def _traffic(self, seen: Observation) -> tuple[Traffic, ...]:
        """What came since the last plan, in stretches of about `BUCKET_S`."""
        num_buckets = max(round((seen.now_s - self._since_s) / BUCKET_S), 1)
        width_s = (seen.now_s - self._since_s) / num_buckets or 1.0
        buckets = [_Bucket() for _ in range(num_buckets)]

        def of(time_s: float) -> _Bucket:
            return buckets[min(max(int((time_s - self._since_s) / width_s), 0), num_buckets - 1)]

        for time_s, tokens in self._arrivals.new(seen):
            of(time_s).num_arrivals += 1
            of(time_s).num_prompt_tokens += int(tokens)
        for time_s, work_s in self._prompts.new(seen):
            of(time_s).prefill_s += work_s
            of(time_s).prefill_squared_s2 += work_s**2
        for time_s, tokens in self._ends.new(seen):
            of(time_s).num_ended += 1
            of(time_s).num_output_tokens += int(tokens)
        for time_s, ttft_s in self._ttfts.new(seen):
            of(time_s).num_first_tokens += 1
            of(time_s).num_in_time += ttft_s <= self._slo.ttft_s
        for time_s, tpot_s in self._tpots.new(seen):
            of(time_s).num_answers += 1
            of(time_s).num_fast += tpot_s <= self._slo.itl_s
        self._since_s = seen.now_s
        return tuple(_as_traffic(bucket, width_s) for bucket in buckets)


class _StepCost:
    """A decode step of the simulated engine, what surrounds it included."""

    def __init__(self, spec: FleetSpec) -> None:
        assert spec.decode is not None
        self._profile = spec.decode

    def step_s(self, *, batch: float, num_context_tokens: float) -> float:
        profile = self._profile
        cost = profile.decode_cost(int(batch))
        return (
            profile.overhead_s
            + cost.base_s
            + cost.per_request_s * batch
            + cost.per_context_token_s * num_context_tokens
        )


def _as_traffic(bucket: _Bucket, width_s: float) -> Traffic:
    return Traffic(
        duration_s=width_s,
        num_arrivals=bucket.num_arrivals,
        prefill_s=bucket.prefill_s,
        prefill_squared_s2=bucket.prefill_squared_s2,
        num_prompt_tokens=bucket.num_prompt_tokens,
        num_ended=bucket.num_ended,
        num_output_tokens=bucket.num_output_tokens,
        ttft=Attainment(num=bucket.num_first_tokens, num_met=bucket.num_in_time),
        itl=Attainment(num=bucket.num_answers, num_met=bucket.num_fast),
    )


def _counts(pool: PoolView) -> PoolCounts:
    return PoolCounts(
        num_ready=pool.num_ready, num_starting=pool.num_starting, num_draining=pool.num_draining
    )


def _kv_usage(pool: PoolView) -> float | None:
    if not pool.num_ready:
        return None
    return pool.kv_tokens / (pool.num_ready * pool.kv_capacity_tokens)
