"""How many prefill replicas hold the TTFT target. Pure.

Two answers. `replay_share` sends the traffic of the look-back through `n` replicas once more: it
sees bursts as they were. `size_steady` is the steady state under a demand: it sees a load that has
just begun. Prompts are served first come, first served, one at a time per replica: a batch of
prompts takes as long as its prompts one by one once they fill the GPU.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import NormalDist

from cluster.scaling.history import Demand
from cluster.scaling.snapshot import Traffic

_NORMAL = NormalDist()

_SERVICE_POINTS = tuple(_NORMAL.inv_cdf((i + 0.5) / 10) for i in range(10))
"""Of a standard normal, with equal weights: prompts' work is near enough lognormal."""

_STEPS = 50
"""In which a replay tells utilisations, and queues of the target's length, apart."""

UTILISATION_PROMPTS = 10
"""Of a replay: over fewer prompts' work, it is chance that tells how busy replicas are."""


def wait_tail(n: int, demand: Demand, utilisation: float, wait_s: float) -> float:
    """P(wait > `wait_s`) in an M/G/n queue with `n` servers at `utilisation` < 1.

    Exponential beyond the probability of waiting at all: Erlang C, in Sakasegawa's approximation
    u^(sqrt(2(n+1)) - 1), and the mean wait of Allen and Cunneen, C / (1-u) * E[S]/n * (1 + c²)/2
    (Bolch et al., Queueing Networks and Markov Chains, 2nd ed., 6.3.4).
    """
    if wait_s < 0 or utilisation >= 1.0:
        return 1.0
    if utilisation <= 0.0 or demand.prefill_s == 0:
        return 0.0
    waits: float = utilisation ** (math.sqrt(2 * (n + 1)) - 1)
    mean_s = demand.prefill_s / n / (1 - utilisation) * (1 + demand.prefill_variation) / 2
    return waits * math.exp(-wait_s / mean_s)


def wait_tail_within(
    n: int, demand: Demand, utilisation: float, wait_s: float, *, duration_s: float
) -> float:
    """The same where `utilisation` lasts for `duration_s` only, from an empty queue; it may be 1.

    Of the work that comes as Brownian motion, against what is done of it: the chance that so much
    has gathered by then (inverse Gaussian, Harrison, Brownian Motion and Stochastic Flow Systems,
    1.8), which goes to the exponential of `wait_tail` with time.
    """
    if wait_s < 0:
        return 1.0
    if utilisation <= 0.0 or demand.prefill_s == 0:
        return 0.0
    utilisation = min(1.0, utilisation)
    waits: float = utilisation ** (math.sqrt(2 * (n + 1)) - 1)
    # Of the wait, in seconds per second: n replicas work it off together.
    drift = 1 - utilisation
    variance = demand.prefill_s / n * (1 + demand.prefill_variation)
    gone, spread = drift * duration_s, math.sqrt(variance * duration_s)
    return waits * (
        _NORMAL.cdf(-(wait_s + gone) / spread)
        + math.exp(-2 * drift * wait_s / variance) * _NORMAL.cdf((gone - wait_s) / spread)
    )


def service_times(demand: Demand) -> tuple[float, ...]:
    """Prompts' seconds of work, as equally likely values with the demand's mean and variation."""
    if demand.prefill_s == 0:
        return (0.0,)
    sigma = math.sqrt(math.log1p(demand.prefill_variation))
    values = [math.exp(sigma * point) for point in _SERVICE_POINTS]
    scale = demand.prefill_s * len(values) / sum(values)
    return tuple(value * scale for value in values)


def attainable_services(demand: Demand, patience_s: float) -> tuple[float, ...]:
    """The service times that an idle replica serves in time.

    Prompts too long for the target miss it with any number of replicas: they must not ask for more.
    Where all are, it is their wait alone that is held to the target.
    """
    return tuple(time for time in service_times(demand) if time < patience_s) or (0.0,)


def attainable_share(demand: Demand, patience_s: float) -> float:
    """The share of prompts that an idle replica serves in time."""
    if demand.prefill_s == 0:
        return 1.0
    log_variance = math.log1p(demand.prefill_variation)
    log_mean = math.log(demand.prefill_s) - log_variance / 2
    if log_variance == 0:
        return float(demand.prefill_s <= patience_s)
    return NormalDist(log_mean, math.sqrt(log_variance)).cdf(math.log(patience_s))


def replay_share(
    history: Sequence[Traffic],
    loads: Sequence[float],
    demand: Demand,
    n: int,
    *,
    patience_s: float,
    correction: float,
) -> float:
    """The share of attainable requests that `n` replicas would have given a first token in time.

    `loads` multiply the history's buckets, one each.

    A fluid queue from bucket to bucket, and on it the wait that chance adds within the time over
    which the utilisation is taken, a bucket's or that of a few prompts: what lasts longer is in the
    fluid queue already.
    """
    if n == 0:
        return 0.0 if demand.rate else 1.0
    few_prompts_s = UTILISATION_PROMPTS * demand.prefill_s
    services = attainable_services(demand, patience_s)
    shares: dict[tuple[int, int], float] = {}

    def share_at(utilisation: float, queued_s: float) -> float:
        # Rounded, so that the hundreds of buckets ask for a few values only.
        key = (round(_STEPS * utilisation), round(_STEPS * queued_s / patience_s))
        if key not in shares:
            shares[key] = _share_in_time(
                partial(
                    wait_tail_within,
                    n,
                    demand,
                    key[0] / _STEPS,
                    duration_s=max(history[0].duration_s, few_prompts_s),
                ),
                services,
                patience_s * (1 - key[1] / _STEPS),
            )
        return shares[key]

    backlog_s, utilisation, met, arrivals = 0.0, 0.0, 0.0, 0.0
    for bucket, load in zip(history, loads, strict=True):
        work_s = bucket.prefill_s * correction * load
        capacity_s = n * bucket.duration_s
        after_s = max(0.0, backlog_s + work_s - capacity_s)
        memory = min(1.0, bucket.duration_s / (few_prompts_s or 1.0))
        utilisation += memory * (work_s / capacity_s - utilisation)
        if bucket.num_arrivals:
            queued_s = (backlog_s + after_s) / 2 / n
            met += load * bucket.num_arrivals * share_at(utilisation, min(queued_s, patience_s))
            arrivals += load * bucket.num_arrivals
        backlog_s = after_s
    return met / arrivals if arrivals else 1.0


def steady_share(demand: Demand, n: int, *, patience_s: float) -> float:
    """The share of attainable requests in time, in the long run. 0 where `n` cannot keep up."""
    load = demand.rate * demand.prefill_s
    if load == 0:
        return 1.0
    if n <= load:
        return 0.0
    services = attainable_services(demand, patience_s)
    return _share_in_time(partial(wait_tail, n, demand, load / n), services, patience_s)


def _share_in_time(
    tail: Callable[[float], float], services: Sequence[float], patience_s: float
) -> float:
    longest_wait_s = patience_s - services[-1]
    if longest_wait_s > 0 and tail(longest_wait_s) < 1e-4:
        return 1.0
    return 1.0 - sum(tail(patience_s - each) for each in services) / len(services)


def late_backlog(backlog_s: float, arriving: float, n: int, *, start_s: float) -> float:
    """Engine seconds that will still wait when a replica that is started now is ready."""
    return max(0.0, backlog_s + (arriving - n) * start_s)
