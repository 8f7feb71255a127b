"""Predicted seconds of engine time, from a request's shape. Pure.

Work, not the number of requests, is what a queue is made of: see the ledger.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Prefill seconds = a + b·n + c·n² for n prompt tokens; decode seconds per output token.

    The defaults are of the demo model on one CPU core. Only ratios matter to the policies, and
    those change little with the hardware.
    """

    prefill_base_s: float = 4e-3
    prefill_per_token_s: float = 4e-5
    prefill_per_token_squared_s: float = 2e-9
    decode_per_token_s: float = 1e-3
    decode_per_context_token_s: float = 5e-7

    def prefill_s(self, num_tokens: int) -> float:
        return (
            self.prefill_base_s
            + self.prefill_per_token_s * num_tokens
            + self.prefill_per_token_squared_s * num_tokens**2
        )

    def decode_s(self, num_prompt_tokens: int, num_output_tokens: int) -> float:
        context = num_prompt_tokens + num_output_tokens / 2
        per_token_s = self.decode_per_token_s + self.decode_per_context_token_s * context
        return per_token_s * num_output_tokens
