"""The cost model of one pool, fitted to the engine steps that its replicas report. Pure.

Least squares on errors relative to the measured time, with old steps forgotten at a fixed rate. So
short steps count as much as long ones, and a step that took ten times as long as others of its
shape, stalled by another process say, counts a hundredth of them. The prior stays in as a few
pseudo-observations, scaled to how fast this engine turns out to be: where the traffic shows nothing
of a coefficient, such as that of long prompts, the prior's proportions hold.
"""

from dataclasses import dataclass, field

from router.costs import DecodeCost, PrefillCost

FORGETTING = 0.998
"""Weight that a step keeps at each later one: about the last 500 steps count."""
MAX_UNSOLVED = 64
"""Steps after which the coefficients are computed anew; earlier while few were seen."""

PRIOR_WEIGHT = 0.02
"""Of each pseudo-observation, in steps seen."""

_Row = tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """What one engine step computed."""

    num_prefill_tokens: int = 0
    """Prompt tokens, of all prompts in it."""
    prefill_attention: int = 0
    """Σ(end² - start²) over the prompts' pieces [start, end): see PrefillCost."""
    num_decodes: int = 0
    """Requests that got their next token."""
    num_context_tokens: int = 0
    """Of these requests together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolCost:
    """The cost model of a pool. Any engine may do both phases, so it has both parts."""

    prefill: PrefillCost = field(default_factory=PrefillCost)
    decode: DecodeCost = field(default_factory=DecodeCost)

    def step_s(self, shape: StepShape) -> float:
        """Predicted seconds of one step; one that reads prompts pays prefill's base only."""
        return _dot(_coefficients(self), _row(shape))


PRIOR_SHAPES = (
    *(StepShape(num_prefill_tokens=n, prefill_attention=n * n) for n in (32, 512, 8192)),
    *(StepShape(num_decodes=n, num_context_tokens=n * 512) for n in (1, 16, 128)),
    StepShape(num_decodes=4, num_context_tokens=4 * 16384),
)
"""Pseudo-observations."""


class CostFit:
    """Fits a PoolCost, step by step. Owns the sums of the normal equations."""

    def __init__(self, prior: PoolCost | None = None) -> None:
        self._prior = prior or PoolCost()
        self.cost = self._prior
        """The model so far."""
        self._num_seen = 0
        self._next_solve = 1
        self._scale = 1.0
        """How much slower than the prior this engine is."""
        size = len(_coefficients(self._prior))
        self._products = [[0.0] * size for _ in range(size)]
        self._sums = [0.0] * size
        self._prior_products = [[0.0] * size for _ in range(size)]
        self._prior_sums = [0.0] * size
        for shape in PRIOR_SHAPES:
            row = _scaled(_row(shape), 1 / self._prior.step_s(shape))
            _add(self._prior_products, self._prior_sums, row, weight=PRIOR_WEIGHT)

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Takes in one step. `seconds` must be above 0."""
        row = _row(shape)
        self._num_seen += 1
        self._learn_scale(seconds / _dot(_coefficients(self._prior), row))
        for sums in (*self._products, self._sums):
            sums[:] = [FORGETTING * value for value in sums]
        _add(self._products, self._sums, _scaled(row, 1 / seconds), weight=1.0)
        if self._num_seen >= self._next_solve:
            self._solve()
            self._next_solve = self._num_seen + min(MAX_UNSOLVED, 1 + self._num_seen // 4)

    def _learn_scale(self, ratio: float) -> None:
        # Towards the median, in steps that shrink: a single stall moves it little.
        if self._num_seen == 1:
            self._scale = ratio
        step = max(0.02, 0.5 / self._num_seen)
        self._scale *= 1 + (step if ratio > self._scale else -step)

    def _solve(self) -> None:
        # The prior's rows give 1 at its own coefficients; at these times the scale they are to.
        share = 1 / self._scale
        priors = zip(self._prior_products, self._prior_sums, strict=True)
        products, sums = [], []
        for line, total, (prior_line, prior_total) in zip(
            self._products, self._sums, priors, strict=True
        ):
            products.append([a + share**2 * b for a, b in zip(line, prior_line, strict=True)])
            sums.append(total + share * prior_total)
        self.cost = _cost(_non_negative_solution(products, sums))


def _non_negative_solution(products: list[list[float]], sums: list[float]) -> list[float]:
    """Least squares without what comes out below zero, the worst first; exact in nearly all cases.

    Args:
        products: XᵀX of full rank.
        sums: Xᵀy.
    """
    free = list(range(len(sums)))
    while True:
        values = _solution([[products[i][j] for j in free] for i in free], [sums[i] for i in free])
        worst = min(range(len(free)), key=lambda at: values[at] * products[free[at]][free[at]])
        if values[worst] >= 0:
            found = dict(zip(free, values, strict=True))
            return [found.get(i, 0.0) for i in range(len(sums))]
        del free[worst]


def _solution(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Of a symmetric, positive definite system, by elimination, which needs no pivoting there."""
    size = len(right)
    rows = [[*line, value] for line, value in zip(matrix, right, strict=True)]
    for pivot in range(size):
        for below in range(pivot + 1, size):
            factor = rows[below][pivot] / rows[pivot][pivot]
            for column in range(pivot, size + 1):
                rows[below][column] -= factor * rows[pivot][column]
    values = [0.0] * size
    for i in reversed(range(size)):
        known = sum(rows[i][j] * values[j] for j in range(i + 1, size))
        values[i] = (rows[i][size] - known) / rows[i][i]
    return values


def _row(shape: StepShape) -> _Row:
    reads = shape.num_prefill_tokens > 0
    return (
        float(reads),
        float(shape.num_prefill_tokens),
        float(shape.prefill_attention),
        float(not reads),
        float(shape.num_decodes),
        float(shape.num_context_tokens),
    )


def _coefficients(cost: PoolCost) -> _Row:
    return (
        cost.prefill.base_s,
        cost.prefill.per_token_s,
        cost.prefill.per_token_squared_s,
        cost.decode.base_s,
        cost.decode.per_request_s,
        cost.decode.per_context_token_s,
    )


def _cost(coefficients: list[float]) -> PoolCost:
    a, b, c, d, e, f = coefficients
    return PoolCost(
        prefill=PrefillCost(base_s=a, per_token_s=b, per_token_squared_s=c),
        decode=DecodeCost(base_s=d, per_request_s=e, per_context_token_s=f),
    )


def _dot(left: _Row, right: _Row) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


def _scaled(row: _Row, factor: float) -> _Row:
    return tuple(value * factor for value in row)


def _add(products: list[list[float]], sums: list[float], row: _Row, *, weight: float) -> None:
    """Adds the observation that `row` at the true coefficients gives 1."""
    for i, value in enumerate(row):
        if value:
            sums[i] += weight * value
            line = products[i]
            for j, other in enumerate(row):
                line[j] += weight * value * other
