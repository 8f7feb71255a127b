"""What an engine can be at: a run of decode steps, or an iteration with prompts in it."""

import math
from dataclasses import dataclass

from benchmarks.simulate.model.requests import SimRequest


@dataclass(slots=True)
class DecodeRun:
    """Decode steps of one batch, begun at `start_s` and planned to be `num_steps`."""

    start_s: float
    num_steps: int
    fixed_s: float
    """Of each step: all but the context."""
    per_context_token_s: float
    context: int
    batch: int

    def length_s(self, num_steps: int) -> float:
        grown = self.context * num_steps + self.batch * num_steps * (num_steps - 1) / 2
        return num_steps * self.fixed_s + self.per_context_token_s * grown

    def steps_begun(self, elapsed_s: float) -> int:
        """Steps that are over, or under way, after `elapsed_s`: the root of `length_s`."""
        square = self.per_context_token_s * self.batch / 2
        linear = self.fixed_s + self.per_context_token_s * self.context - square
        if square <= 0:
            root = elapsed_s / linear
        else:
            root = (math.sqrt(linear**2 + 4 * square * elapsed_s) - linear) / (2 * square)
        return min(max(math.ceil(root - 1e-9), 1), self.num_steps)


@dataclass(slots=True)
class PromptIteration:
    """Chunks of prompts, with one step of the running batch beside them where chunks share."""

    chunks: list[tuple[SimRequest, int]]
    steps_batch: bool
