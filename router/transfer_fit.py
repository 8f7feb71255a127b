"""What a read of KV takes between two engines, fitted to the reads that were reported. Pure.

Least squares on errors relative to the measured time, as in `router.cost_fit`: a read that took ten
times as long as others of its size, stalled by another process say, counts a hundredth of them. So
it would hardly notice that a way got slow. The speed is followed apart, within some ten reads: what
was measured before counts as if it had been measured at the speed of now. The prior is what other
pairs take, scaled to how fast these reads turn out to be: where all of them are of one size, its
proportions hold.
"""

import math
from dataclasses import dataclass

FORGETTING = 0.98
"""Weight that a read keeps at each later one: about the last 50 count."""
SPEED_KEPT = 0.9
"""Of the speed so far, at each later read."""
MAX_RATIO = 4.0
"""By which one read may differ from what was expected and still tell of the speed; a stall of
seconds tells no more than this."""
PRIOR_WEIGHT = 0.1
"""Of each pseudo-observation, in reads."""
PRIOR_BYTES = (2**16, 2**28)
"""Of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferCost:
    """Seconds of one read = a + b·bytes. The defaults are of a fast network."""

    fixed_s: float = 1e-3
    per_byte_s: float = 1e-10

    def seconds(self, num_bytes: float) -> float:
        return self.fixed_s + self.per_byte_s * num_bytes

    def times(self, factor: float) -> "TransferCost":
        return TransferCost(fixed_s=factor * self.fixed_s, per_byte_s=factor * self.per_byte_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """Reads that have ended well, added up; at least one."""

    num: int
    num_bytes: int
    seconds: float
    """Above 0."""


class TransferFit:
    """Fits a TransferCost, read by read. Owns the sums of the normal equations."""

    def __init__(self, *, trust: float = 0.0) -> None:
        """`trust`: how many reads the prior's speed counts for; 0 where only its shape is known."""
        self._trust = trust
        self._weight = 0.0
        self._log_scale = 0.0
        """Sum of the logarithms of how much longer reads took than by the prior."""
        self._products = (0.0, 0.0, 0.0)
        self._sums = (0.0, 0.0)

    def observe(self, reads: Reads, prior: TransferCost) -> TransferCost:
        """Takes in some reads; returns what reads take, as far as is known now."""
        if self._weight:
            self._follow_speed(reads, self._solution(prior))
        kept = FORGETTING**reads.num
        self._weight = kept * self._weight + reads.num
        ratio = math.log(reads.seconds / _expected_s(reads, prior))
        self._log_scale = kept * self._log_scale + reads.num * ratio
        row = (reads.num / reads.seconds, reads.num_bytes / reads.seconds)
        self._products = _added(self._products, row, kept=kept, weight=reads.num)
        a, b = self._sums
        self._sums = (kept * a + reads.num * row[0], kept * b + reads.num * row[1])
        return self._solution(prior)

    def _follow_speed(self, reads: Reads, cost: TransferCost) -> None:
        """Has all earlier reads have taken as much longer as the speed has changed."""
        seconds = reads.seconds
        expected_s = min(max(_expected_s(reads, cost), seconds / MAX_RATIO), seconds * MAX_RATIO)
        change = (seconds / expected_s) ** (1 - SPEED_KEPT**reads.num)
        self._log_scale += self._weight * math.log(change)
        aa, ab, bb = self._products
        self._products = (aa / change**2, ab / change**2, bb / change**2)
        a, b = self._sums
        self._sums = (a / change, b / change)

    def _solution(self, prior: TransferCost) -> TransferCost:
        scaled = prior.times(math.exp(self._log_scale / (self._weight + self._trust)))
        products, (a, b) = self._products, self._sums
        for num_bytes in PRIOR_BYTES:
            seconds = scaled.seconds(num_bytes)
            row = (1 / seconds, num_bytes / seconds)
            products = _added(products, row, kept=1.0, weight=PRIOR_WEIGHT)
            a, b = a + PRIOR_WEIGHT * row[0], b + PRIOR_WEIGHT * row[1]
        aa, ab, bb = products
        determinant = aa * bb - ab * ab
        fixed_s, per_byte_s = (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant
        if fixed_s < 0:
            fixed_s, per_byte_s = 0.0, b / bb
        elif per_byte_s < 0:
            fixed_s, per_byte_s = a / aa, 0.0
        return TransferCost(fixed_s=fixed_s, per_byte_s=per_byte_s)


def _expected_s(reads: Reads, cost: TransferCost) -> float:
    return cost.fixed_s * reads.num + cost.per_byte_s * reads.num_bytes


def _added(
    products: tuple[float, float, float], row: tuple[float, float], *, kept: float, weight: float
) -> tuple[float, float, float]:
    aa, ab, bb = products
    a, b = row
    return kept * aa + weight * a * a, kept * ab + weight * a * b, kept * bb + weight * b * b
