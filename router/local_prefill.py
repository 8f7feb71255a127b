"""Whether decode reads a prompt itself: a pure function of what is predicted of both ways.

An engine that writes answers has time to spare wherever its steps take less than the ITL target. A
prompt that fits into the next step's is read there where that is sooner, which spares it the
handover. A longer one is read in pieces, each step with as much of it as the target leaves: slower
than in prefill, so that is for prompts that prefill would be late with. While prefill replicas
start, decode takes what they cannot.
"""

from dataclasses import dataclass

STEP_SHARE = 0.7
"""Of the ITL target that a step with a piece of a prompt may take. Answers that are slower for a
while must still meet the target on average, and a short one has little to make up its handover."""

KV_SHARE = 0.4
"""Of the KV cache that answers may come to hold: as much longer as steps take, so many more are
there at once. The rest is for what a prefill pool that is catching up hands over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeReader:
    """A decode replica that might read a prompt."""

    base_s: float
    """Of a step, whatever is in it."""
    answers_s: float
    """What the answers that it writes add to each step."""
    reading_s: float
    """Predicted seconds of the prompts that it is reading already."""
    request_s: float
    """Of this prompt, less what is cached there."""
    kv_usage_fraction: float
    has_room: bool
    """Nothing waits there for KV blocks or a place in the batch."""
    is_cached: bool
    """Some of the prompt is cached there."""

    @property
    def step_s(self) -> float:
        """Its next step without any prompt: a token for each of its answers."""
        return self.base_s + self.answers_s

    @property
    def one_step_s(self) -> float:
        """The next step, if it reads all of these prompts: they bring a base of their own."""
        return self.answers_s + self.reading_s + self.request_s

    @property
    def one_step_ttft_s(self) -> float:
        """Until the first token, if that step reads them all; the one before may have begun."""
        return self.step_s + self.one_step_s

    def can_slow_to(self, step_s: float) -> bool:
        """Whether there is room in the KV cache for steps that take so long."""
        return self.has_room and self.kv_usage_fraction * step_s <= KV_SHARE * self.step_s

    def in_pieces_s(self, limit_s: float) -> float:
        """Until the prompt is read in steps of `limit_s`, which must be above `step_s`."""
        return (self.reading_s + self.request_s) * limit_s / (limit_s - self.step_s)

    def ttft_s(self, limit_s: float | None) -> float:
        """Until the first token, where no step that also writes answers may take longer."""
        if limit_s is None or self.one_step_s <= limit_s or limit_s <= self.step_s:
            return self.one_step_ttft_s
        return self.step_s + self.in_pieces_s(limit_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPlan:
    """Decode reads the prompt."""

    reason: str
    ttft_s: float
    """Until the first token, as predicted."""
    step_limit_s: float | None = None
    """In pieces: how long a step may take that reads one beside answers. None for all at once."""

    @property
    def relieves_prefill(self) -> bool:
        """Whether prefill would read it if that pool were larger: scaling must hear of it."""
        return self.step_limit_s is not None


def plan_local_prefill(
    reader: DecodeReader, *, prefill_s: float, handover_s: float, ttft_s: float, itl_s: float
) -> LocalPlan | None:
    """How decode reads a prompt; None has it go to prefill.

    Args:
        prefill_s: until a prefill replica is predicted to be done with it.
        handover_s: from there to decode's first token, as measured lately.
        ttft_s: the target.
        itl_s: the target: no answer that decode writes may wait longer for a token.
    """
    if reader.one_step_s <= itl_s:
        first_token_s = reader.one_step_ttft_s
        if first_token_s >= prefill_s + handover_s or not reader.can_slow_to(reader.one_step_s):
            return None
        reason = "cached_in_decode" if reader.is_cached else "short_prompt"
        return LocalPlan(reason=reason, ttft_s=first_token_s)
    limit_s = STEP_SHARE * itl_s
    if prefill_s <= ttft_s or reader.step_s >= limit_s or not reader.can_slow_to(limit_s):
        return None
    first_token_s = reader.step_s + reader.in_pieces_s(limit_s)
    if first_token_s > ttft_s:
        return None
    return LocalPlan(reason="prefill_saturated", ttft_s=first_token_s, step_limit_s=limit_s)
