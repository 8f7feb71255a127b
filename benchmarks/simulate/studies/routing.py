"""What routers lose by knowing little of each other: mean TTFT against one that knows everything.

16 prefill replicas at load 0.85 with uneven prompts; k routers hear from replicas and from nobody
else, as often as `REPORTS` say, and whenever they have sent a prompt (`router.reroute`). The
omniscient router sees every engine's true remaining work at every request. How much old reports
cost depends on how many prompts a replica reads meanwhile: hence engines of two speeds.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.simulate.model.fleet import Fleet, FleetSpec, feed
from benchmarks.simulate.model.profiles import LLAMA_8B_H100, LLAMA_70B_H100, EngineProfile
from benchmarks.simulate.model.requests import Arrival, SimRequest
from benchmarks.simulate.model.routing import SimRouter
from benchmarks.simulate.studies.progress import with_progress
from benchmarks.simulate.workloads.lengths import Lognormal
from engine.outstanding import LOAD_INTERVAL_S
from router.placement import Placement
from router.policies import POLICIES

NUM_REPLICAS, LOAD = 16, 0.85
NUM_ROUTERS = (1, 4, 16)
GOALS = {1: 1.15, 16: 1.5}
"""Mean TTFT against the omniscient router's, by number of routers."""
PROFILES = (LLAMA_8B_H100, LLAMA_70B_H100)
OUR_POLICY = "p2c"
_PROMPTS = Lognormal(mean=12_000, sigma=1.1, least=64, most=128_000)
"""Mooncake's conversations, roughly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reports:
    """When a router hears from a replica."""

    text: str
    period_s: float
    with_first_tokens: bool


OURS = Reports(
    text=f"as ours: every {LOAD_INTERVAL_S:g} s, with first tokens",
    period_s=LOAD_INTERVAL_S,
    with_first_tokens=True,
)
OLD = Reports(text="every 5 s, with first tokens", period_s=5.0, with_first_tokens=True)
SELDOM = Reports(text="every 5 s, without first tokens", period_s=5.0, with_first_tokens=False)
REPORTS = (OURS, OLD, SELDOM)


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRow:
    """One policy with one number of routers. `reports` is None for the omniscient router."""

    profile: str
    prompt_s: float
    """What a prompt takes to read, on average."""
    policy: str
    reports: Reports | None
    num_routers: int
    mean_ttft_s: float
    vs_omniscient: float


class OmniscientFleet(Fleet):
    """Sends each prompt to the engine with least true work left."""

    def place(self, router: SimRouter, request: SimRequest) -> Placement:
        placement = super().place(router, request)
        least = min(
            self.prefill.ready,
            key=lambda each: (each.engine.prefill_left_s, each.replica_id),
        )
        return replace(
            placement, prefill_at=replace(placement.prefill_at, replica_id=least.replica_id)
        )


def make_workload(profile: EngineProfile, num_requests: int, seed: int) -> list[Arrival]:
    """Poisson arrivals of prompts that keep the replicas at `LOAD`; answers of one token.

    The load is that of the very prompts drawn. With a tail as heavy as this one, a sample's mean is
    some per cent off its distribution's, which at this load decides how long the queues are.
    """
    rng = random.Random(seed)
    prompts = [_PROMPTS.draw(rng) for _ in range(num_requests)]
    rate = LOAD * NUM_REPLICAS / _mean_prompt_s(profile, prompts)
    arrivals, now_s = [], 0.0
    for num_tokens in prompts:
        now_s += rng.expovariate(rate)
        arrivals.append(Arrival(now_s, num_tokens, 1))
    return arrivals


def study_routing(*, num_requests: int, seed: int) -> list[StudyRow]:
    """Our policy with every kind of report and engine; the others with one of each, to compare."""
    return [row for profile in PROFILES for row in _study(profile, num_requests, seed)]


def _study(profile: EngineProfile, num_requests: int, seed: int) -> list[StudyRow]:
    workload = make_workload(profile, num_requests, seed)
    prompt_s = _mean_prompt_s(profile, [each.prompt_tokens for each in workload])
    omniscient = OmniscientFleet(_spec(profile, "least_work", OURS, 1, seed))
    least_s = _mean_ttft_s(omniscient, workload)

    def row(policy: str, reports: Reports | None, num_routers: int, mean_ttft_s: float) -> StudyRow:
        return StudyRow(
            profile=profile.name,
            prompt_s=prompt_s,
            policy=policy,
            reports=reports,
            num_routers=num_routers,
            mean_ttft_s=mean_ttft_s,
            vs_omniscient=mean_ttft_s / least_s,
        )

    rows = [row("omniscient", None, 1, least_s)]
    cases = _cases(profile)
    for policy, reports, count in with_progress(cases, total=len(cases), what=profile.name):
        fleet = Fleet(_spec(profile, policy, reports, count, seed))
        rows.append(row(policy, reports, count, _mean_ttft_s(fleet, workload)))
    return rows


def format_study(rows: Sequence[StudyRow]) -> str:
    """The rows as Markdown."""
    lines = [
        f"{NUM_REPLICAS} prefill replicas, load {LOAD:g}. Reports to one router from each replica.",
        "",
        "| engine | a prompt s | policy | reports | routers | mean TTFT s | against omniscient |"
        " goal |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {row.profile} | {row.prompt_s:.2f} | {row.policy} |"
            f" {row.reports.text if row.reports else 'always'} | {row.num_routers} |"
            f" {row.mean_ttft_s:.2f} | {row.vs_omniscient:.2f} | {_goal(row)} |"
            for row in rows
        ),
    ]
    return "\n".join(lines) + "\n"


def _goal(row: StudyRow) -> str:
    goal = GOALS.get(row.num_routers)
    if goal is None or row.policy != OUR_POLICY:
        return ""
    return f"{goal:g}: {'met' if row.vs_omniscient <= goal else 'missed'}"


def _cases(profile: EngineProfile) -> list[tuple[str, Reports, int]]:
    cases = [(OUR_POLICY, reports, count) for reports in REPORTS for count in NUM_ROUTERS]
    if profile is PROFILES[0]:
        others = [policy for policy in POLICIES if policy != OUR_POLICY]
        cases += [(policy, OLD, count) for policy in others for count in NUM_ROUTERS]
    return cases


def _mean_prompt_s(profile: EngineProfile, prompts: Sequence[int]) -> float:
    cost = profile.prefill
    return sum(cost.seconds(num_uncached=each, num_tokens=each) for each in prompts) / len(prompts)


def _spec(
    profile: EngineProfile, policy: str, reports: Reports, num_routers: int, seed: int
) -> FleetSpec:
    return FleetSpec(
        prefill=profile,
        decode=None,
        num_routers=num_routers,
        report_period_s=reports.period_s,
        reports_with_outputs=reports.with_first_tokens,
        policy=policy,
        seed=seed,
    )


def _mean_ttft_s(fleet: Fleet, workload: Sequence[Arrival]) -> float:
    for _ in range(NUM_REPLICAS):
        fleet.prefill.start(is_ready=True)
    feed(fleet, workload)
    fleet.events.run_until(workload[-1].arrival_s + 600.0)
    ttfts_s = [each.ttft_s for each in fleet.requests if each.ttft_s is not None]
    return sum(ttfts_s) / len(ttfts_s)
