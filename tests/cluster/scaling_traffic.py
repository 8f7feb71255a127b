"""Arrivals as routers would have reported them."""

import random
from collections.abc import Callable

from cluster.scaling.snapshot import Traffic


def counts_of(rate: Callable[[float], float], *, seconds: int, seed: int) -> list[Traffic]:
    """Poisson arrivals in buckets of 2 s, the last of which ends at 0 s."""
    rng = random.Random(seed)
    buckets = []
    for start_s in range(-seconds, 0, 2):
        mean, num, at = 2.0 * rate(start_s + 1.0), 0, rng.expovariate(1.0)
        while at < mean:
            num, at = num + 1, at + rng.expovariate(1.0)
        buckets.append(Traffic(duration_s=2.0, num_arrivals=num))
    return buckets
