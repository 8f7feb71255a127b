"""One simulated request: its shape, where it is, and when its tokens came."""

from dataclasses import dataclass

from router.phases import RequestPhase
from router.slo import Slo


@dataclass(frozen=True, slots=True)
class Arrival:
    """A line of a workload."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    """At least one."""
    block_ids: tuple[int, ...] = ()
    """Of the prompt's blocks, each id standing for its block and all before it; empty where the
    trace does not say what prompts share."""


@dataclass(slots=True, eq=False)
class SimRequest:
    """A request on its way. Owned by whoever holds it: a router, then an engine."""

    arrival: Arrival
    request_id: int
    phase: RequestPhase = RequestPhase.RECEIVED
    router_id: int = 0
    num_computed_tokens: int = 0
    """Tokens whose KV its engine holds."""
    num_output_tokens: int = 0
    """As of when it last changed hands."""
    hands_over: bool = False
    """Prefill only: its engine keeps its KV until another has pulled it."""
    first_token_s: float | None = None
    ended_s: float | None = None
    num_moves: int = 0
    num_preempted: int = 0
    step_limit_s: float | None = None
    """Of a step that reads a piece of its prompt beside answers; None for any length."""
    priority: int = 0
    """Its latest start, in ms, where engines order prompts by it; 0 where they take them as they
    come."""
    link_bytes_per_s: float | None = None
    """Of the way that its KV takes to decode; None for that of the profile."""
    work_s: float = 0.0
    """Its line in its router's ledger for the replica that it is at."""

    @property
    def arrival_time(self) -> float:
        return self.arrival.arrival_s

    @property
    def num_tokens(self) -> int:
        """Of prompt and answer so far."""
        return self.arrival.prompt_tokens + self.num_output_tokens

    @property
    def max_tokens(self) -> int | None:
        """Nobody knows how long an answer gets."""
        return None

    def blocks(self, block_size: int | None) -> list[int]:
        """None: engines keep no prefixes."""
        return []

    @property
    def num_left(self) -> int:
        return self.arrival.output_tokens - self.num_output_tokens

    @property
    def ttft_s(self) -> float | None:
        if self.first_token_s is None:
            return None
        return self.first_token_s - self.arrival.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Its mean inter-token latency; None while it is not known, 0 for a single token."""
        if self.first_token_s is None or self.ended_s is None:
            return None
        return (self.ended_s - self.first_token_s) / max(self.arrival.output_tokens - 1, 1)

    def meets(self, slo: Slo) -> bool:
        """Both targets, the second by its mean; what never ended has missed them."""
        ttft_s, tpot_s = self.ttft_s, self.tpot_s
        return (
            ttft_s is not None
            and tpot_s is not None
            and ttft_s <= slo.ttft_s
            and tpot_s <= slo.itl_s
        )
