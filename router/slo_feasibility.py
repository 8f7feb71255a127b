"""Whether targets are feasible: the best case, and those below it, which no replica meets. Pure."""

from dataclasses import dataclass

from router.costs import DecodeCost, PrefillCost
from router.slo import Slo


@dataclass(frozen=True, slots=True, kw_only=True)
class BestCase:
    """The best that a request can get: the shortest prompt, alone in its replicas.

    None where nothing is known.
    """

    ttft_s: float | None
    itl_s: float | None


def predict_best(prefill: PrefillCost, decode: DecodeCost) -> BestCase:
    """What the cost models say of a prompt of one token."""
    return BestCase(
        ttft_s=prefill.seconds(num_uncached=1, num_tokens=1),
        itl_s=decode.step_s(batch=1, num_context_tokens=1),
    )


def describe_infeasible(best: BestCase, slo: Slo, *, how: str) -> tuple[str, ...]:
    """A line for each target that is below the best; `how` the best is known, in a word."""
    pairs = (("slo.ttft_s", slo.ttft_s, best.ttft_s), ("slo.itl_s", slo.itl_s, best.itl_s))
    return tuple(
        f"{name}: {target:g} s cannot be met with any number of replicas: "
        f"the best that can be had is {known:.3g} s, as {how}"
        for name, target, known in pairs
        if known is not None and known > target
    )
