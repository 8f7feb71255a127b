"""What routers lose by knowing little of each other: mean TTFT against one that knows everything.

16 prefill replicas at load 0.85 with uneven prompts; k routers hear from a replica with each first
token that it sends them and every 5 s, and from nobody else. The omniscient router sees every
engine's true remaining work at every request.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.simulate.fleet import Fleet, FleetSpec, feed
from benchmarks.simulate.lengths import Lognormal, poisson
from benchmarks.simulate.profiles import LLAMA_8B_H100
from benchmarks.simulate.progress import with_progress
from benchmarks.simulate.requests import Arrival, SimRequest
from router.policies import POLICIES

NUM_REPLICAS, LOAD, REPORT_PERIOD_S = 16, 0.85, 5.0
NUM_ROUTERS = (1, 4, 16)
GOALS = {1: 1.15, 16: 1.5}
_PROMPTS = Lognormal(mean=12_000, sigma=1.1, least=64, most=128_000)
"""Mooncake's conversations, roughly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRow:
    """One policy with one number of routers."""

    policy: str
    num_routers: int
    mean_ttft_s: float
    vs_omniscient: float


class _OmniscientFleet(Fleet):
    """Sends each prompt to the engine with least true work left."""

    def _to_prefill(self, request: SimRequest) -> None:
        self.send_to_prefill(
            request,
            min(
                self.prefill.ready,
                key=lambda each: (each.engine.prefill_left_s, each.replica_id),
            ),
        )


def make_workload(num_requests: int, seed: int) -> list[Arrival]:
    """Poisson arrivals of prompts that keep the replicas at `LOAD`; answers of one token."""
    cost = LLAMA_8B_H100.prefill
    rng = random.Random(seed)
    sample = [_PROMPTS.draw(rng) for _ in range(20_000)]
    mean_s = sum(cost.seconds(num_uncached=each, num_tokens=each) for each in sample) / len(sample)
    rate = LOAD * NUM_REPLICAS / mean_s
    return poisson(
        lambda time_s: rate,
        most=rate,
        duration_s=num_requests / rate,
        lengths=lambda time_s, rng: (_PROMPTS.draw(rng), 1),
        seed=seed,
    )


def study_routing(*, num_requests: int, seed: int) -> list[StudyRow]:
    """Every policy with every number of routers, and the omniscient router."""
    workload = make_workload(num_requests, seed)
    least_s = _mean_ttft_s(_OmniscientFleet(_spec("least_work", 1, seed)), workload)
    rows = [StudyRow(policy="omniscient", num_routers=1, mean_ttft_s=least_s, vs_omniscient=1.0)]
    cases = [(policy, count) for policy in POLICIES for count in NUM_ROUTERS]
    for policy, count in with_progress(cases, total=len(cases), what="runs"):
        mean_s = _mean_ttft_s(Fleet(_spec(policy, count, seed)), workload)
        rows.append(
            StudyRow(
                policy=policy,
                num_routers=count,
                mean_ttft_s=mean_s,
                vs_omniscient=mean_s / least_s,
            )
        )
    return rows


def format_study(rows: Sequence[StudyRow]) -> str:
    """The rows as Markdown."""
    lines = [
        f"{NUM_REPLICAS} prefill replicas, load {LOAD:g}, reports with first tokens and every"
        f" {REPORT_PERIOD_S:g} s.",
        "",
        "| policy | routers | mean TTFT s | against omniscient |",
        "|---|---|---|---|",
        *(
            f"| {row.policy} | {row.num_routers} | {row.mean_ttft_s:.2f} |"
            f" {row.vs_omniscient:.2f} |"
            for row in rows
        ),
    ]
    return "\n".join(lines) + "\n"


def _spec(policy: str, num_routers: int, seed: int) -> FleetSpec:
    return FleetSpec(
        prefill=LLAMA_8B_H100,
        decode=None,
        num_routers=num_routers,
        report_period_s=REPORT_PERIOD_S,
        policy=policy,
        seed=seed,
    )


def _mean_ttft_s(fleet: Fleet, workload: Sequence[Arrival]) -> float:
    for _ in range(NUM_REPLICAS):
        fleet.prefill.start(is_ready=True)
    feed(fleet, workload)
    fleet.agenda.run_until(workload[-1].arrival_s + 600.0)
    ttfts_s = [each.ttft_s for each in fleet.requests if each.ttft_s is not None]
    return sum(ttfts_s) / len(ttfts_s)
