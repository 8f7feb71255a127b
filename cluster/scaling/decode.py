"""How many decode replicas hold the ITL target and the KV cache. Pure.

A decode step takes longer the more requests share it: the target on ITL is a limit on the batch of
each replica, and demand is the number of requests that decode at once (Little's law: rate times
answer length times step time). That number in an infinite-server queue is Poisson whatever the
lengths' distribution (M/G/∞ insensitivity), which gives the headroom for a percentile.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from cluster.scaling.history import Demand
from cluster.scaling.snapshot import Engines, Traffic

KV_LIMIT = 0.9
"""Of the KV cache that may be planned for: above, vLLM preempts requests."""

IMBALANCE = 1.0
"""Requests that the fullest replica has above the mean; two choices keep it at about one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeModel:
    """One decode replica under a demand."""

    engines: Engines
    context_tokens: float
    itl_s: float
    correction: float = 1.0

    def step_s(self, batch: float) -> float:
        """Of a step that `batch` requests share on average; as for one where fewer do."""
        whole = max(1, math.ceil(batch))
        return self.correction * self.engines.decode.step_s(
            batch=whole, num_context_tokens=round(whole * self.context_tokens)
        )

    @property
    def kv_batch(self) -> float:
        """The most requests whose context fits."""
        return KV_LIMIT * self.engines.num_kv_tokens / max(1.0, self.context_tokens)

    @property
    def itl_batch(self) -> int:
        """The most requests that share a step within the ITL target; 1 where none can."""
        batches = range(1, self.engines.max_batch + 1)
        return max(1, bisect_right(batches, self.itl_s, key=self.step_s))

    @property
    def max_batch(self) -> int:
        """The most requests that a replica should have: by ITL, and by the KV cache."""
        return max(1, min(self.itl_batch, int(self.kv_batch)))


def concurrency(demand: Demand, model: DecodeModel, n: int) -> float:
    """Requests that decode at once in the long run, over all of `n` replicas.

    The fixed point of active = rate · tokens · step(active / n), from below; infinite if none.
    """
    tokens_per_s = demand.rate * demand.output_tokens
    active = 0.0
    for _ in range(100):
        following = tokens_per_s * model.step_s(active / n)
        if following - active < 0.01 * max(1.0, active):
            return following
        if following > 2 * n * model.engines.max_batch:
            return math.inf
        active = following
    return active


def steady_share(demand: Demand, model: DecodeModel, n: int) -> float:
    """The share of time in which `n` replicas hold ITL and KV, in the long run."""
    if demand.rate == 0:
        return 1.0
    active = concurrency(demand, model, n) if n else math.inf
    if math.isinf(active) or active == 0:
        return 0.0 if active else 1.0
    return NormalDist(active, math.sqrt(active)).cdf(n * model.max_batch)


def replay_share(
    history: Sequence[Traffic],
    loads: Sequence[float],
    demand: Demand,
    model: DecodeModel,
    n: int,
    *,
    share: float,
) -> float:
    """The share of decoding, in request seconds, that `n` replicas would have done in time.

    `loads` multiply what arrived, bucket by bucket.
    """
    if n == 0:
        return 0.0 if demand.rate else 1.0
    z = max(0.0, NormalDist().inv_cdf(share))
    limit = n * model.max_batch
    most = 2 * model.engines.max_batch
    steps_s: dict[int, float] = {}
    active, total, met = 0.0, 0.0, 0.0
    for bucket, load in zip(history, loads, strict=True):
        if bucket.num_arrivals == 0 and active < 0.01:
            continue
        batch = min(math.ceil(active / n), most)
        step_s = steps_s.get(batch) or steps_s.setdefault(batch, model.step_s(batch))
        life_s = demand.output_tokens * step_s
        settled = load * bucket.num_arrivals / bucket.duration_s * life_s
        before = active
        active = settled + (active - settled) * math.exp(-bucket.duration_s / life_s)
        mean = (before + active) / 2
        # Answers shorter than a bucket rise and fall within it, unseen.
        hidden = z * math.sqrt(mean * min(1.0, bucket.duration_s / life_s))
        total += mean
        met += mean if mean + hidden + IMBALANCE * (n - 1) <= limit else 0.0
    return met / total if total else 1.0


def late_requests(
    num_decoding: int, demand: Demand, model: DecodeModel, n: int, *, start_s: float
) -> float:
    """Requests above `n` full batches when a replica that is started now is ready."""
    if n == 0:
        return num_decoding + demand.rate * start_s
    full = n * model.max_batch
    ending_per_s = full / (demand.output_tokens * model.step_s(model.max_batch))
    return max(0.0, num_decoding + (demand.rate - ending_per_s) * start_s - full)
