"""How many replicas of which engine a workload needs when their number never changes.

The smallest prefill pool that holds TTFT, then the smallest decode pool that holds ITL, each found
by bisection over simulations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.simulate.model.fleet import FleetSpec, run_fixed
from benchmarks.simulate.model.profiles import EngineProfile
from benchmarks.simulate.model.requests import Arrival
from benchmarks.simulate.studies.charts import draw_lines
from benchmarks.simulate.studies.progress import with_progress
from benchmarks.simulate.workloads.demand import mean_gpus
from router.slo import Slo

MAX_REPLICAS = 1024
DRAIN_S = 120.0


class WorkloadTooLargeError(RuntimeError):
    """No pool of `MAX_REPLICAS` holds the targets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPlan:
    """One engine's answer. `None` replicas: no number of them holds the target."""

    profile: EngineProfile
    num_prefill: int | None
    num_decode: int | None
    best_ttft_share: float
    """That an idle engine reaches."""
    cost_per_million_tokens: float | None
    """Of prompts and answers together."""
    by_size: tuple[tuple[int, float], ...]
    """Decode replicas and the share that holds ITL with them."""


def plan_fleet(
    workload: Sequence[Arrival],
    slo: Slo,
    profiles: Sequence[EngineProfile],
    *,
    share: float,
    gpu_hour_price: float,
) -> list[FleetPlan]:
    """The plan for each engine.

    Raises:
        WorkloadTooLargeError: the workload would take more than `MAX_REPLICAS`.
    """
    return [
        _plan_one(workload, slo, profile, share=share, gpu_hour_price=gpu_hour_price)
        for profile in with_progress(profiles, total=len(profiles), what="engines")
    ]


def _plan_one(
    workload: Sequence[Arrival],
    slo: Slo,
    profile: EngineProfile,
    *,
    share: float,
    gpu_hour_price: float,
) -> FleetPlan:
    spec = FleetSpec(
        prefill=profile, decode=profile, edge_s=0.01, handover_s=0.002, ttft_s=slo.ttft_s
    )
    enough = max(int(2 * mean_gpus(workload, profile, profile, slo) / profile.gpus), 1)
    if enough > MAX_REPLICAS:
        raise WorkloadTooLargeError(f"{profile.name}: over {MAX_REPLICAS} replicas")
    idle = sum(profile.idle_ttft_s(each.prompt_tokens) <= slo.ttft_s for each in workload)
    tried: dict[int, float] = {}

    def ttft_share(num_prefill: int) -> float:
        fleet = run_fixed(
            spec, workload, num_prefill=num_prefill, num_decode=enough, drain_s=DRAIN_S
        )
        met = sum((each.ttft_s or slo.ttft_s * 2) <= slo.ttft_s for each in fleet.requests)
        return met / len(workload)

    num_prefill = min_replicas_for(ttft_share, share)

    def itl_share(num_decode: int) -> float:
        fleet = run_fixed(
            spec,
            workload,
            num_prefill=num_prefill or enough,
            num_decode=num_decode,
            drain_s=DRAIN_S,
        )
        slow = slo.itl_s * 2
        met = sum(
            (slow if each.tpot_s is None else each.tpot_s) <= slo.itl_s for each in fleet.requests
        )
        tried[num_decode] = met / len(workload)
        return tried[num_decode]

    num_decode = min_replicas_for(itl_share, share)
    return FleetPlan(
        profile=profile,
        num_prefill=num_prefill,
        num_decode=num_decode,
        best_ttft_share=idle / len(workload),
        cost_per_million_tokens=(
            _cost(workload, (num_prefill + num_decode) * profile.gpus, gpu_hour_price)
            if num_prefill is not None and num_decode is not None
            else None
        ),
        by_size=tuple(sorted(tried.items())),
    )


def _cost(workload: Sequence[Arrival], gpus: int, gpu_hour_price: float) -> float:
    """Of a million tokens."""
    hours = max(workload[-1].arrival_s, 1.0) / 3600
    num_tokens = sum(each.prompt_tokens + each.output_tokens for each in workload)
    return gpus * hours * gpu_hour_price / num_tokens * 1e6


def min_replicas_for(share_of: Callable[[int], float], share: float) -> int | None:
    """The smallest size whose share is reached, if any up to `MAX_REPLICAS` reaches it.

    It is taken that more are never worse. Doubling ends early where twice as many change nothing.
    """
    high, last = 1, -1.0
    while (found := share_of(high)) < share:
        if high >= MAX_REPLICAS or (high > 1 and found > 0 and found <= last):
            return None
        high, last = 2 * high, found
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if share_of(middle) >= share else (middle, high)
    return high


def format_plan(name: str, plans: Sequence[FleetPlan], slo: Slo, plot: Path) -> str:
    """The plans as Markdown; draws `plot` on the way."""
    draw_lines(
        {
            plan.profile.name: (
                [float(size) for size, _ in plan.by_size],
                [share for _, share in plan.by_size],
            )
            for plan in plans
        },
        title=f"{name}: requests within an ITL of {slo.itl_s * 1e3:g} ms",
        x_label="decode replicas",
        y_label="share of requests",
        path=plot,
    )
    lines = [
        f"# {name}: TTFT {slo.ttft_s:g} s, ITL {slo.itl_s * 1e3:g} ms",
        "",
        "| engine | prefill | decode | GPUs | $ per million tokens |",
        "|---|---|---|---|---|",
    ]
    for plan in plans:
        if plan.num_prefill is None:
            best = f"an idle engine holds TTFT for {plan.best_ttft_share:.1%} only"
            lines.append(f"| {plan.profile.name} | {best} | | | |")
        elif plan.num_decode is None or plan.cost_per_million_tokens is None:
            lines.append(f"| {plan.profile.name} | {plan.num_prefill} | ITL cannot be held | | |")
        else:
            gpus = (plan.num_prefill + plan.num_decode) * plan.profile.gpus
            lines.append(
                f"| {plan.profile.name} | {plan.num_prefill} | {plan.num_decode} | {gpus} |"
                f" {plan.cost_per_million_tokens:.3f} |"
            )
    return "\n".join(lines) + "\n"
