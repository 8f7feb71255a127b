"""Predicted seconds of engine time, from what an engine is asked to compute. Pure.

Work, not the number of requests, is what a queue is made of: see the ledger. The defaults are of
the demo model on one CPU core; `router.cost_fit` corrects them by what replicas report.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillCost:
    """Seconds = a + b·uncached + c·(tokens² - cached²), where cached = tokens - uncached.

    Attention is read by every uncached token over all before it: of the square of all tokens, the
    square of the cached ones is not computed again. With an empty cache that is c·tokens².
    """

    base_s: float = 4e-3
    per_token_s: float = 4e-5
    per_token_squared_s: float = 2e-9

    def seconds(self, *, num_uncached: int, num_tokens: int) -> float:
        """Of one prompt of `num_tokens`, of which `num_uncached` are to be computed."""
        num_cached = num_tokens - num_uncached
        return (
            self.base_s
            + self.per_token_s * num_uncached
            + self.per_token_squared_s * (num_tokens**2 - num_cached**2)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCost:
    """Seconds of one decode step = a + b·batch + c·Σcontext."""

    base_s: float = 1e-3
    per_request_s: float = 2e-4
    per_context_token_s: float = 5e-7

    def step_s(self, *, batch: int, num_context_tokens: int) -> float:
        """Of a step of `batch` requests with `num_context_tokens` between them."""
        return (
            self.base_s + self.per_request_s * batch + self.per_context_token_s * num_context_tokens
        )

    def share_s(self, *, num_context_tokens: float) -> float:
        """What one request adds to every step that it is part of."""
        return self.per_request_s + self.per_context_token_s * num_context_tokens
