"""DistServe's published measurements, met by the simulator: OPT-13B on ShareGPT lengths.

Owns the published points, the lengths that are assumed, and the comparison. Each point is one run
of a hundred requests a GPU. DistServe's scripts seed the generators (`--seed 0`), so that every
rate has the same requests in the same order, at the same arrivals but for their scale: these
arrivals are made again here. The requests' lengths are not public. The two numbers of the prompts'
distribution were fitted to vLLM's points and knee; both distributions' families and the answers'
sigma were chosen with the points in view. Engines, their settings, targets and batching rules are
as published.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from benchmarks.simulate.model.fleet import FleetSpec, run_fixed
from benchmarks.simulate.model.profiles import (
    OPT_13B_DISTSERVE_DECODE,
    OPT_13B_DISTSERVE_PREFILL,
    OPT_13B_VLLM,
)
from benchmarks.simulate.model.requests import Arrival
from benchmarks.simulate.workloads.lengths import Lognormal, Normal
from router.slo import Slo

SLO = Slo(ttft_s=0.25, itl_s=0.1)
VLLM_POINTS = {0.25: 0.90, 0.5: 0.90, 1.0: 0.85, 1.5: 0.81, 2.0: 0.71, 2.25: 0.70, 2.5: 0.68}
"""Attainment by requests per second per GPU (DistServe, OSDI 24, Fig. 8; 3.0 gave 0.55)."""
KNEE_SHARE = 0.9
VLLM_KNEE, DISTSERVE_KNEE = 0.50, 2.30
POINT_TOLERANCE, KNEE_TOLERANCE = 0.03, 0.20

CONTEXT_TOKENS = 2048
"""DistServe's samples have fewer, prompt and answer together."""
PROMPTS = Normal(mean=720, sigma=500, least=4, most=CONTEXT_TOKENS)
ANSWERS = Lognormal(mean=220, sigma=0.9, least=2, most=CONTEXT_TOKENS)
REQUESTS_PER_GPU = 100
ARRIVALS_SEED = 0
NUM_RUNS = 60
"""Each with lengths of its own, as those that were measured are not known."""
DISTSERVE_GPUS = 3
"""One prefill engine on two, one decode engine on one."""


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
    """The published run's arrivals at `rate` a second, with lengths by `seed`."""
    rng = random.Random(seed)
    return [
        Arrival(arrival_s, *_draw_lengths(rng))
        for arrival_s in published_arrivals_s(rate, num_requests)
    ]


def published_arrivals_s(rate: float, num_requests: int) -> list[float]:
    """When DistServe's load generator sends: the first request at once.

    Its generator is numpy's old one, which NEP 19 freezes.
    """
    gaps_s = np.random.RandomState(ARRIVALS_SEED).gamma(1.0, 1 / rate, size=num_requests)
    return list(accumulate(gaps_s[:-1].tolist(), initial=0.0))


def vllm_attainment(rate: float) -> list[float]:
    """Of vLLM on one GPU, both phases in one engine; by run."""
    spec = FleetSpec(prefill=OPT_13B_VLLM, decode=None)
    return _attainment(spec, rate, num_gpus=1, num_decode=0)


def distserve_attainment(rate: float) -> list[float]:
    """Of DistServe on its three GPUs; by run."""
    spec = FleetSpec(prefill=OPT_13B_DISTSERVE_PREFILL, decode=OPT_13B_DISTSERVE_DECODE)
    return _attainment(spec, rate, num_gpus=DISTSERVE_GPUS, num_decode=1)


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


def _draw_lengths(rng: random.Random) -> tuple[int, int]:
    while True:
        prompt, answer = PROMPTS.draw(rng), ANSWERS.draw(rng)
        if prompt + answer < CONTEXT_TOKENS:
            return prompt, answer


def _attainment(spec: FleetSpec, rate: float, *, num_gpus: int, num_decode: int) -> list[float]:
    shares = []
    for seed in range(NUM_RUNS):
        workload = make_workload(
            rate * num_gpus, num_requests=REQUESTS_PER_GPU * num_gpus, seed=seed
        )
        fleet = run_fixed(spec, workload, num_prefill=1, num_decode=num_decode)
        num_met = sum(request.meets(SLO) for request in fleet.requests)
        shares.append(num_met / len(fleet.requests))
    return shares
