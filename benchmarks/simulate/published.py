"""DistServe's published measurements, met by the simulator: OPT-13B on ShareGPT lengths.

Owns the published points, the lengths that are assumed, and the comparison. The sample of ShareGPT
is not public: the two numbers of the prompts' distribution and the mean of the answers' were fitted
to the points. Chosen with the points in view, too: both distributions' families, the answers'
sigma, the runs' length, and DistServe's ratio of engines. Engines, targets and batching rules are
as published.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.simulate.fleet import FleetSpec, run_fixed
from benchmarks.simulate.lengths import Lognormal, Normal, poisson
from benchmarks.simulate.profiles import (
    OPT_13B_DISTSERVE_DECODE,
    OPT_13B_DISTSERVE_PREFILL,
    OPT_13B_VLLM,
)
from benchmarks.simulate.requests import Arrival, Slo

SLO = Slo(ttft_s=0.25, itl_s=0.1)
VLLM_POINTS = {0.25: 0.90, 0.5: 0.90, 1.0: 0.85, 1.5: 0.81, 2.0: 0.71, 2.25: 0.70, 2.5: 0.68}
"""Attainment by requests per second per GPU (DistServe, OSDI 24, Fig. 8; 3.0 gave 0.55)."""
KNEE_SHARE = 0.9
VLLM_KNEE, DISTSERVE_KNEE = 0.50, 2.30
POINT_TOLERANCE, KNEE_TOLERANCE = 0.03, 0.20

CONTEXT_TOKENS = 2048
PROMPTS = Normal(mean=800, sigma=425, least=4, most=CONTEXT_TOKENS)
ANSWERS = Lognormal(mean=190, sigma=0.9, least=2, most=CONTEXT_TOKENS)
NUM_RUNS, NUM_REQUESTS = 10, 1000
"""Runs as a benchmark makes them, each from an idle engine; their length is not published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One rate."""

    rate: float
    """Requests per second per GPU."""
    published: float
    simulated: float
    deviation: float
    """Standard, of one run from the mean of all."""

    @property
    def holds(self) -> bool:
        return abs(self.simulated - self.published) <= POINT_TOLERANCE


@dataclass(frozen=True, slots=True, kw_only=True)
class Knee:
    """The highest rate per GPU at which `KNEE_SHARE` of the requests meet both targets."""

    system: str
    published: float
    simulated: float

    @property
    def holds(self) -> bool:
        return abs(self.simulated / self.published - 1) <= KNEE_TOLERANCE


def make_workload(rate: float, *, num_requests: int, seed: int) -> list[Arrival]:
    """Poisson arrivals whose prompt and answer fit OPT's context between them."""

    def lengths(time_s: float, rng: random.Random) -> tuple[int, int]:
        while True:
            prompt, answer = PROMPTS.draw(rng), ANSWERS.draw(rng)
            if prompt + answer <= CONTEXT_TOKENS:
                return prompt, answer

    return poisson(
        lambda time_s: rate, most=rate, duration_s=num_requests / rate, lengths=lengths, seed=seed
    )


def vllm_attainment(rate: float) -> list[float]:
    """Of vLLM on one GPU, both phases in one engine; by run."""
    spec = FleetSpec(prefill=OPT_13B_VLLM, decode=None)
    return _attainment(spec, rate, num_prefill=1, num_decode=0)


def distserve_attainment(rate: float) -> list[float]:
    """Of DistServe, one prefill engine on two GPUs and two decode engines on one each; by run.

    DistServe replicates each phase by its own goodput: with these profiles two to one.
    """
    spec = FleetSpec(prefill=OPT_13B_DISTSERVE_PREFILL, decode=OPT_13B_DISTSERVE_DECODE)
    return _attainment(spec, 4 * rate, num_prefill=1, num_decode=2)


def find_knee(rates: Sequence[float], attainments: Sequence[float]) -> float:
    """Where attainment falls through `KNEE_SHARE`, linear between the rates; 0 if it never held."""
    knee = 0.0
    points = list(zip(rates, attainments, strict=True))
    for (rate, share), (next_rate, next_share) in pairwise(points):
        if share >= KNEE_SHARE > next_share:
            return rate + (next_rate - rate) * (share - KNEE_SHARE) / (share - next_share)
        if share >= KNEE_SHARE:
            knee = next_rate
    return knee


def _attainment(spec: FleetSpec, rate: float, *, num_prefill: int, num_decode: int) -> list[float]:
    shares = []
    for seed in range(NUM_RUNS):
        workload = make_workload(rate, num_requests=NUM_REQUESTS, seed=seed)
        fleet = run_fixed(spec, workload, num_prefill=num_prefill, num_decode=num_decode)
        num_met = sum(SLO.is_met_by(request) for request in fleet.requests)
        shares.append(num_met / len(fleet.requests))
    return shares
