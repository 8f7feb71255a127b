"""What the scaling plan is made from, and what it says. Frozen records; no decisions.

Prefill demand is in predicted engine seconds (the cost model's, summed over prompts), so that the
plan needs to know neither prompt lengths nor cached prefixes. Decode demand is in requests, tokens
and context, because its step time depends on how many share a step.
"""

from dataclasses import dataclass, field
from typing import Protocol

from router.slo import Slo


class StepCost(Protocol):
    """Seconds of one decode step of one replica (router.costs.DecodeCost)."""

    def step_s(self, *, batch: int, num_context_tokens: int) -> float:
        """`batch` requests in the step, `num_context_tokens` summed over them."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """How many requests must meet the promise."""

    slo: Slo
    share: float
    """Of the requests that must meet each of its two, in (0, 1): percentile / 100."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolLimits:
    """How large a pool may be. `min_replicas == max_replicas` is a pool of fixed size."""

    min_replicas: int = 1
    max_replicas: int = 1
    warm_replicas: int = 0
    """Kept beyond what is needed, for those who cannot wait for a start."""
    gpus_per_replica: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleSettings:
    """What the operator wants. Times are in seconds."""

    targets: Targets
    prefill: PoolLimits
    decode: PoolLimits
    gpu_budget: int | None = None
    """GPUs that both pools may use together, or no such limit."""
    up_delay_s: float = 0.0
    """How long more must have been wanted before more are started."""
    down_delay_s: float = 30.0
    """How long fewer must have been enough, and how long after any change, before one goes."""
    look_back_s: float = 600.0
    """The traffic that a smaller pool must be predicted to have held."""
    idle_s: float = 300.0
    """Without a request for this long, a pool whose minimum is 0 goes to zero."""
    expected_start_s: float = 60.0
    """How long a replica takes to start, until a start has been seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attainment:
    """Of requests that were measured. None from replicas that are still warming up."""

    num: int = 0
    num_met: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What all routers saw in one stretch of time; best about a second, or the TTFT target."""

    duration_s: float
    num_arrivals: int = 0
    prefill_s: float = 0.0
    """Predicted engine seconds of the prompts that arrived, cached prefixes taken off."""
    prefill_squared_s2: float = 0.0
    """The same, each squared before they are summed: how uneven prompts are."""
    num_prompt_tokens: int = 0
    """Of the requests that arrived, cached or not: what decode will hold."""
    num_ended: int = 0
    num_output_tokens: int = 0
    """Of the requests that ended."""
    ttft: Attainment = Attainment()
    """Of first tokens sent, waiting included."""
    itl: Attainment = Attainment()
    """Of requests that ended: their mean inter-token latency."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is outstanding now, in all routers."""

    prefill_backlog_s: float = 0.0
    """Predicted engine seconds of accepted prompts that are not yet prefilled, held ones too."""
    num_decoding: int = 0
    """Requests that are with decode, or held because decode has no replica."""
    kv_usage_fraction: float | None = None
    """Mean over decode replicas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolCounts:
    """Replicas by what they are."""

    num_ready: int
    num_starting: int = 0
    """Asked for and not ready yet, whether placed or still waiting for a machine."""
    num_draining: int = 0
    """Finish what they have; they take no requests but still occupy their GPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """What one replica can do, as the cost models have it now."""

    decode: StepCost
    num_kv_tokens: int
    """Tokens of KV cache of one decode replica."""
    max_batch: int = 256
    """Requests that one decode replica runs at once at most (vLLM's `max_num_seqs`)."""
    overhead_s: float = 0.0
    """Of TTFT outside of the prefill engine: tokenising, sending."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleSnapshot:
    """All that a plan looks at, beside the operator's settings and what is remembered."""

    now_s: float
    traffic: tuple[Traffic, ...] | None
    """What came since the last snapshot, oldest first; None where no router has reported."""
    load: Load
    prefill: PoolCounts
    decode: PoolCounts
    engines: Engines


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedState:
    """What is remembered of one pool from plan to plan. Times are `now_s` of their snapshots."""

    target: int | None = None
    """What was planned last."""
    num_ready: int = 0
    starting_since_s: tuple[float, ...] = ()
    """When each replica that is starting was asked for, oldest first."""
    start_s: float | None = None
    """How long starts took, a moving mean; None until one was seen."""
    correction: float = 1.0
    """Measured work over predicted work, as far as the attainment tells."""
    steady_since_s: float | None = None
    """From when on it has had what was predicted to be enough, and kept up."""
    wants_more_since_s: float | None = None
    fewer_do_since_s: float | None = None
    changed_s: float | None = None
    shrunk_s: float | None = None
    """Of the last shrinking that was not regretted."""
    forecasts: tuple[tuple[float, float], ...] = ()
    """When a load was forecast for a start's time later, and which; oldest first."""
    down_factor: float = 1.0
    """On `down_delay_s`: grows with every shrinking that was regretted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleState:
    """What is remembered between plans. The policy hands its next state back."""

    history: tuple[Traffic, ...] = ()
    """Of the look-back, oldest first."""
    older: tuple[Traffic, ...] = ()
    """Before the look-back: for what comes back periodically."""
    output_tokens: float | None = None
    """Of an answer, a moving mean; None until one has ended."""
    last_arrival_s: float | None = None
    reported_s: float | None = None
    """When routers last reported."""
    prefill: LearnedState = field(default=LearnedState())
    decode: LearnedState = field(default=LearnedState())


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolPlan:
    """How many replicas one pool should have, and why."""

    target: int
    needed: int
    """What the traffic asks for, before limits, budget and delays."""
    reason: str
    held_by: str | None = None
    """What keeps the target from what is needed."""
    inputs: tuple[tuple[str, float], ...] = ()
    """The numbers that decided, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalePlan:
    prefill: PoolPlan
    decode: PoolPlan
    state: ScaleState
