"""What routing expects of a request, learned from those that were before it. Pure.

Owns two moving means: of how many tokens a response has, and of how long it takes from prefill's
first token to decode's. Placement asks here; nothing is decided.
"""

WEIGHT = 0.02
"""Of each new value in its mean."""


class Predictor:
    """One router's means. They begin with what is typical of the demo model."""

    def __init__(self) -> None:
        self._mean_output_tokens = 128.0
        self._mean_transfer_s = 0.01

    def observe_response(self, num_output_tokens: int) -> None:
        """A response is complete."""
        self._mean_output_tokens += WEIGHT * (num_output_tokens - self._mean_output_tokens)

    def observe_transfer(self, seconds: float) -> None:
        """Decode took so long from prefill's first token to its own."""
        self._mean_transfer_s += WEIGHT * (seconds - self._mean_transfer_s)

    def output_tokens(self, max_tokens: int | None) -> int:
        """How long a response is likely to be: what recent ones were, at most `max_tokens`."""
        expected = int(self._mean_output_tokens) or 1
        return expected if max_tokens is None else min(expected, max_tokens)

    def transfer_s(self, num_tokens: int) -> float:
        """From prefill's first token to decode's, as it was lately, however long prompts were.

        `num_tokens`: of the prompt, for those who know what each token takes (the simulator).
        """
        return self._mean_transfer_s
