"""Other systems' autoscaling formulas, as published, on the simulator's observations.

Where a formula is not said to the end, it gets the kinder reading; each class says which. None of
them sees more than its system would.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise

from benchmarks.simulate.model.fleet import FleetSpec
from benchmarks.simulate.model.history import Observation, PoolView
from benchmarks.simulate.model.scaled_run import FleetSize
from benchmarks.simulate.workloads.demand import MeanShape, decode_requests_per_s, prefill_work_s
from router.slo import Slo


class RayServe:
    """Ray Serve's default policy (ray/serve/autoscaling_policy.py, Ray 2.60).

    Desired = ready · (mean ongoing per replica over 30 s / target), target 2, after 30 s of wanting
    more and 600 s of wanting less; smoothing factors 1. Each pool by its own requests.
    """

    period_s = 5.0
    TARGET_ONGOING, LOOK_BACK_S, UP_DELAY_S, DOWN_DELAY_S = 2, 30.0, 30.0, 600.0

    def __init__(self) -> None:
        self._pools = (_DelayedTarget(self), _DelayedTarget(self))

    def plan(self, seen: Observation) -> FleetSize:
        prefill, decode = self._pools
        return FleetSize(
            prefill.plan(seen.now_s, seen.prefill), decode.plan(seen.now_s, seen.decode)
        )


class _DelayedTarget:
    def __init__(self, settings: RayServe) -> None:
        self._settings = settings
        self._ongoing: deque[int] = deque(maxlen=int(settings.LOOK_BACK_S / settings.period_s))
        self._wants_more_since_s: float | None = None
        self._wants_less_since_s: float | None = None

    def plan(self, now_s: float, pool: PoolView) -> int:
        self._ongoing.append(pool.num_ongoing)
        mean = sum(self._ongoing) / len(self._ongoing)
        current = pool.num_replicas
        desired = max(math.ceil(mean / self._settings.TARGET_ONGOING), 1)
        if desired > current:
            self._wants_less_since_s = None
            self._wants_more_since_s = _first(self._wants_more_since_s, now_s)
            is_due = now_s - self._wants_more_since_s >= self._settings.UP_DELAY_S
        elif desired < current:
            self._wants_more_since_s = None
            self._wants_less_since_s = _first(self._wants_less_since_s, now_s)
            is_due = now_s - self._wants_less_since_s >= self._settings.DOWN_DELAY_S
        else:
            self._wants_more_since_s = self._wants_less_since_s = None
            is_due = False
        return desired if is_due else current


class LlmD:
    """llm-d's SLO formula with KEDA (llm-d documentation, architecture/autoscaling).

    s = the mean over 45 s of min(2, P90 latency / target); above 0.55, n + ceil(n·(s·(ready/n)/0.55
    - 1)); below 0.40, n - floor(n·(1 - s/0.40)). Published for one pool with the larger of the TTFT
    and TPOT shares; here prefill goes by TTFT and decode by TPOT, which it calls future work.
    Kubernetes' autoscaler acts every 15 s and shrinks to the largest wish of the last 300 s.
    """

    period_s = 15.0
    WINDOW_S, STABILISATION_S, UP, DOWN = 45.0, 300.0, 0.55, 0.40

    def __init__(self, slo: Slo) -> None:
        self._slo = slo
        self._shares: tuple[deque[float], deque[float]] = (deque(maxlen=3), deque(maxlen=3))
        num_wishes = int(self.STABILISATION_S / self.period_s)
        self._wishes: tuple[deque[int], deque[int]] = (
            deque(maxlen=num_wishes),
            deque(maxlen=num_wishes),
        )

    def plan(self, seen: Observation) -> FleetSize:
        since_s = seen.now_s - self.WINDOW_S
        ttft = _p90(seen.history.ttfts_s.since(since_s))
        tpot = _p90(seen.history.tpots_s.since(since_s))
        return FleetSize(
            self._plan_pool(0, seen.prefill, ttft and ttft / self._slo.ttft_s),
            self._plan_pool(1, seen.decode, tpot and tpot / self._slo.itl_s),
        )

    def _plan_pool(self, which: int, pool: PoolView, share: float | None) -> int:
        shares, wishes = self._shares[which], self._wishes[which]
        shares.append(min(2.0, share or 0.0))
        mean, current = sum(shares) / len(shares), max(pool.num_replicas, 1)
        wish = current
        if mean > self.UP:
            ready_part = pool.num_ready / current
            wish += max(math.ceil(current * (mean * ready_part / self.UP - 1)), 0)
        elif mean < self.DOWN:
            wish -= math.floor(current * (1 - mean / self.DOWN))
        if not wishes:
            wishes.extend([current] * (wishes.maxlen or 1))
        wishes.append(max(wish, 1))
        return max(wish, min(current, max(wishes)), 1)


class Dynamo:
    """Dynamo's planner (planner design document): a predicted floor, a reactive correction.

    Every 180 s: prefill = ceil(rate / engine's rate at the mean prompt), decode = ceil(rate /
    engine's rate within ITL at prompt + half an answer); the next rate is predicted, here by
    least squares on the last rates' differences (ARIMA(1,1,0), its default's simplest form). Every
    5 s: one more where every engine's estimated latency is over the target, one fewer where N - 1
    would be under 80 % of it. Engine rates come from the profile, where Dynamo measures them: for
    prefill the rate at which the mean TTFT of Poisson arrivals meets the target.
    """

    period_s = 5.0
    INTERVAL_S, SENSITIVITY = 180.0, 0.8

    def __init__(self, spec: FleetSpec, slo: Slo) -> None:
        assert spec.decode is not None
        self._prefill, self._decode, self._slo = spec.prefill, spec.decode, slo
        self._rates: list[float] = []
        self._floor = FleetSize(1, 1)
        self._planned_s = 0.0

    def plan(self, seen: Observation) -> FleetSize:
        since_s = max(seen.now_s - self.INTERVAL_S, 0.0)
        shape = self._recent_shape(seen, since_s)
        if shape is None:
            return FleetSize(seen.prefill.num_replicas, seen.decode.num_replicas)
        if seen.now_s - self._planned_s >= self.INTERVAL_S:
            self._planned_s = seen.now_s
            arrivals = seen.history.prompt_tokens.count_since(since_s)
            self._rates.append(arrivals / self.INTERVAL_S)
            rate = max(_next_by_arima(self._rates), 0.0)
            per_decode = decode_requests_per_s(self._decode, shape, self._slo.itl_s)
            self._floor = FleetSize(math.ceil(rate * shape.prefill_s), math.ceil(rate / per_decode))
        return FleetSize(
            max(self._react_prefill(seen.prefill, shape), self._floor.prefill, 1),
            max(self._react_decode(seen.decode, shape), self._floor.decode, 1),
        )

    def _recent_shape(self, seen: Observation, since_s: float) -> MeanShape | None:
        prompt = seen.history.prompt_tokens.mean_since(since_s)
        output = seen.history.output_tokens.mean_since(since_s)
        if prompt is None or output is None:
            return None
        prefill_s = prefill_work_s(self._prefill, round(prompt))
        return MeanShape(prompt_tokens=prompt, output_tokens=output, prefill_s=prefill_s)

    def _react_prefill(self, pool: PoolView, shape: MeanShape) -> int:
        def ttft_s(num_replicas: int) -> float:
            tokens = pool.waiting_tokens / num_replicas + shape.prompt_tokens
            return tokens / shape.prompt_tokens * shape.prefill_s

        return self._react(pool, ttft_s, self._slo.ttft_s)

    def _react_decode(self, pool: PoolView, shape: MeanShape) -> int:
        def itl_s(num_replicas: int) -> float:
            batch = pool.num_ongoing / num_replicas
            return self._decode.step_s(round(batch), batch * shape.context_tokens)

        return self._react(pool, itl_s, self._slo.itl_s)

    def _react(self, pool: PoolView, latency_s: Callable[[int], float], target_s: float) -> int:
        ready = pool.num_ready
        if not ready or pool.num_starting:  # it waits until the last change has come about
            return pool.num_replicas
        if latency_s(ready) > target_s:
            return ready + 1
        if ready > 1 and latency_s(ready - 1) < self.SENSITIVITY * target_s:
            return ready - 1
        return ready


class HeteroScale:
    """HeteroScale (ByteDance, 2025), from summaries of the paper.

    Decode tokens per second over a target per replica drives both pools at a fixed ratio of prefill
    to decode; it acts outside of ±10 %, and by a factor of 1.2 where the time between tokens is
    over 1.2 times its target; at most every 180 s out and 600 s in. The target (80 % of what a
    replica sustains) and the ratio are those of the whole workload's mean request: it is told the
    future that far. Prefill follows the unrounded decode replicas; the first minute decides
    nothing, as there are no served tokens to go by.
    """

    period_s = 15.0
    OUT_COOLDOWN_S, IN_COOLDOWN_S, BAND, LOAD, START_S = 180.0, 600.0, 0.10, 0.8, 60.0

    def __init__(self, spec: FleetSpec, slo: Slo, shape: MeanShape) -> None:
        assert spec.decode is not None
        self._slo = slo
        requests_per_s = decode_requests_per_s(spec.decode, shape, slo.itl_s)
        self._tokens_per_s = self.LOAD * requests_per_s * shape.output_tokens
        self._ratio = requests_per_s * shape.prefill_s
        self._acted: float | None = None
        """Decode replicas, before rounding, of the last change."""
        self._changed_s = -math.inf

    def plan(self, seen: Observation) -> FleetSize:
        now_s, since_s = seen.now_s, seen.now_s - 60.0
        current = FleetSize(seen.prefill.num_replicas, seen.decode.num_replicas)
        tokens_per_s = seen.history.output_tokens.sum_since(since_s) / min(60.0, now_s or 1.0)
        wanted = tokens_per_s / self._tokens_per_s
        acted = self._acted or float(current.decode)
        tpot_s = seen.history.tpots_s.mean_since(since_s)
        if tpot_s is not None and tpot_s > 1.2 * self._slo.itl_s:
            wanted = max(wanted, 1.2 * acted)
        cooldown_s = self.OUT_COOLDOWN_S if wanted > acted else self.IN_COOLDOWN_S
        is_cooling = now_s - self._changed_s < cooldown_s
        if now_s < self.START_S or is_cooling or abs(wanted / acted - 1) <= self.BAND:
            return current
        self._acted, self._changed_s = max(wanted, 0.01), now_s
        return FleetSize(max(math.ceil(wanted * self._ratio), 1), max(math.ceil(wanted), 1))


def _first(since_s: float | None, now_s: float) -> float:
    return now_s if since_s is None else since_s


def _rate_within(service_s: float, target_s: float) -> float:
    """The arrivals per second that one server of fixed service time answers within the target.

    M/D/1: wait = service · load / (2 · (1 - load)). Where even an idle server is late: all it can.
    """
    spare = 2 * (target_s - service_s) / service_s
    return (spare / (1 + spare) if spare > 0 else 1.0) / service_s


def _p90(values: Sequence[float]) -> float | None:
    return sorted(values)[int(0.9 * (len(values) - 1))] if values else None


def _next_by_arima(rates: Sequence[float]) -> float:
    """One step ahead by ARIMA(1,1,0): the last value and φ times the last difference."""
    differences = [later - earlier for earlier, later in pairwise(rates)]
    square = sum(each**2 for each in differences[:-1])
    if square == 0:
        return rates[-1]
    phi = sum(earlier * later for earlier, later in pairwise(differences)) / square
    return rates[-1] + min(max(phi, -1.0), 1.0) * differences[-1]
