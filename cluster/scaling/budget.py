"""Both pools within one budget of GPUs, in the ratio that the traffic needs. Pure."""

from cluster.scaling.snapshot import PoolLimits


def share_budget(
    wanted: tuple[int, int], limits: tuple[PoolLimits, PoolLimits], budget: int | None
) -> tuple[int, int]:
    """The sizes of prefill and decode that the budget allows, `wanted` if it allows that.

    Where it does not, replicas are given one by one to the pool that has the smaller share of what
    it wants, from the minimums on: the slower stage limits both, so the smaller share counts.
    """
    prefill, decode = limits
    if budget is None or _gpus(wanted, limits) <= budget:
        return wanted
    sizes = (min(prefill.min_replicas, wanted[0]), min(decode.min_replicas, wanted[1]))
    while True:
        larger = [
            each
            for each in ((sizes[0] + 1, sizes[1]), (sizes[0], sizes[1] + 1))
            if each[0] <= wanted[0] and each[1] <= wanted[1] and _gpus(each, limits) <= budget
        ]
        if not larger:
            return sizes
        sizes = max(larger, key=lambda each: _smaller_share(each, wanted))


def _gpus(sizes: tuple[int, int], limits: tuple[PoolLimits, PoolLimits]) -> int:
    return sum(n * each.gpus_per_replica for n, each in zip(sizes, limits, strict=True))


def _smaller_share(sizes: tuple[int, int], wanted: tuple[int, int]) -> tuple[float, float]:
    shares = sorted(n / want if want else 1.0 for n, want in zip(sizes, wanted, strict=True))
    return shares[0], shares[1]
