"""Whether a new request is taken: pure functions from what is expected of it to a plan.

Judged at the end of its prefill, with the decode load expected then. A router that judged by the
decode load of now would refuse while prefill empties decode, admit while decode is empty and
prefill full, and so have both pools swing between the two.
"""

import math
from dataclasses import dataclass

from router.costs import DecodeCost
from router.slo import Slo


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """What is done where the cluster cannot hold its promise."""

    refuses: bool = False
    """A request that is expected to miss a target; otherwise it queues."""
    max_queued: int | None = None
    """Requests without a first token that one router holds; None for any number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """What is expected of a new request."""

    ttft_s: float
    itl_s: float
    """Right after its first token."""
    num_queued: int
    """Requests of this router without a first token, this one not counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionPlan:
    admits: bool
    reason: str
    retry_after_s: int = 0
    """When to come back, in whole seconds, for one that is not admitted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeOutlook:
    """The decode pool on the way to the end of a request's prefill."""

    cost: DecodeCost
    mean_work_s: float
    """What the requests of one replica add to each of its steps now, on average."""
    num_replicas: int
    num_arriving: float
    """Requests that come to the pool before this one does."""
    share_s: float
    """What each of these, and this one, adds to each step."""
    num_output_tokens: int
    """Of a typical answer: how many steps a request stays."""

    def itl_s(self, after_s: float) -> float:
        """The step that is expected after `after_s` seconds, with this request in it."""
        step_s = self.cost.base_s + self.mean_work_s
        ended = min(1.0, after_s / (self.num_output_tokens * step_s)) if step_s else 0.0
        arrived_s = self.share_s * self.num_arriving / self.num_replicas
        return self.cost.base_s + self.mean_work_s * (1 - ended) + arrived_s + self.share_s


def plan_admission(expected: Expectation, slo: Slo, limits: AdmissionLimits) -> AdmissionPlan:
    """Whether a new request is taken, and when to come back if not."""
    if limits.max_queued is not None and expected.num_queued >= limits.max_queued:
        return _refusal("queue_full", expected.ttft_s)
    if limits.refuses and expected.ttft_s > slo.ttft_s:
        return _refusal("ttft", expected.ttft_s - slo.ttft_s)
    if limits.refuses and expected.itl_s > slo.itl_s:
        return _refusal("itl", expected.ttft_s)
    return AdmissionPlan(admits=True, reason="taken")


def _refusal(reason: str, wait_s: float) -> AdmissionPlan:
    return AdmissionPlan(admits=False, reason=reason, retry_after_s=max(1, math.ceil(wait_s)))
