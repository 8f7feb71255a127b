"""What a rise that nobody announces costs those who do not know the future.

`steps` is a load that stays, until it triples. A policy that knows nothing of what comes has at
that moment what it has at any other of a load that stays. This finds the fewest GPUs at that moment
with which enough requests can still be answered in time, whatever is started from then on. Who
would meet `steps` whenever its rise came has as many, in proportion, all the time before
`prompt-shift` shifts.
"""

from dataclasses import dataclass
from statistics import fmean

from benchmarks.simulate.autoscalers.oracle import SLOT_S, Schedule, find_schedule
from benchmarks.simulate.model.history import Observation
from benchmarks.simulate.model.scaled_run import FleetSize, Outcome, run_scaled
from benchmarks.simulate.studies.compare import (
    GOAL_ATTAINMENT,
    GOAL_GPU_HOURS,
    CompareOptions,
    Workload,
    load_workload,
)
from benchmarks.simulate.studies.progress import with_progress
from benchmarks.simulate.workloads.scenarios import CALM_S, RISE_S, SHIFT_S

RISING, STAYING = "steps", "prompt-shift"


class _Prepared:
    """Keeps one size until the rise, and asks for more than enough when it comes."""

    period_s = SLOT_S

    def __init__(self, held: FleetSize, after: FleetSize) -> None:
        self._held, self._after = held, after

    def plan(self, seen: Observation) -> FleetSize:
        return self._held if seen.now_s < RISE_S else self._after


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLoad:
    """The cheapest way to be ready for it. GPUs are means over the calm load before it."""

    held: FleetSize
    attainment: float
    held_gpus: float
    oracle_gpus: float
    """That the same load takes if it is known to stay."""
    staying_vs_oracle: float
    """GPU hours against the oracle's where the load stays for a while, with as much in reserve as
    long as it does and the oracle's own sizes after."""

    @property
    def is_within_goal(self) -> bool:
        return self.staying_vs_oracle <= GOAL_GPU_HOURS


def measure_step_load(options: CompareOptions) -> StepLoad:
    """Tries fleets until the cheapest is found that attains the goal.

    Raises:
        ValueError: none of up to the oracle's largest pools does.
    """
    workload = load_workload(RISING, options)
    schedule, _ = _oracle(workload, options)
    peak = FleetSize(max(schedule.prefill), max(schedule.decode))
    calm = _slots(CALM_S, RISE_S - options.profile.start_s - SLOT_S)
    least = FleetSize(max(schedule.prefill[calm]), max(schedule.decode[calm]))
    after = FleetSize(2 * peak.prefill, 2 * peak.decode)
    found: tuple[FleetSize, float] | None = None
    decode = peak.decode
    sizes = range(least.prefill, peak.prefill + 1)
    for prefill in with_progress(sizes, total=len(sizes), what="prefill replicas before the rise"):
        # More of prefill never needs more of decode, so the search goes one way only.
        while decode >= least.decode:
            held = FleetSize(prefill, decode)
            if found is not None and _gpus(held, options) >= _gpus(found[0], options):
                decode -= 1
                continue
            attainment = _run(workload, options, _Prepared(held, after), held).attainment
            if attainment < GOAL_ATTAINMENT:
                break
            found = held, attainment
            decode -= 1
    if found is None:
        raise ValueError(f"{peak} before the rise are not enough")
    held, attainment = found
    held_gpus, oracle_gpus = _gpus(held, options), _mean_gpus(schedule, calm, options)
    return StepLoad(
        held=held,
        attainment=attainment,
        held_gpus=held_gpus,
        oracle_gpus=oracle_gpus,
        staying_vs_oracle=_staying_vs_oracle(held_gpus / oracle_gpus, options),
    )


def format_step_load(found: StepLoad) -> str:
    """The result as text."""
    return (
        f"`{RISING}`: the fewest GPUs just before the load triples with which"
        f" {GOAL_ATTAINMENT:.0%} can still meet both targets, though more than enough is asked for"
        f" at once: {found.held.prefill} prefill and {found.held.decode} decode replicas"
        f" ({found.attainment:.2%}), {found.held_gpus:g} GPUs."
        f" A load that stays takes {found.oracle_gpus:.1f}:"
        f" {found.held_gpus / found.oracle_gpus:.2f} times as many.\n"
        f"`{STAYING}`: the same reserve until {SHIFT_S:g} s, for a rise that may come at any time,"
        f" and the oracle's own sizes from then on cost {found.staying_vs_oracle:.2f} times the"
        f" oracle's GPU hours. Goal: {GOAL_GPU_HOURS:g}. "
        + (
            "Both can be met.\n"
            if found.is_within_goal
            else "Nobody who does not know when the rise comes meets both.\n"
        )
    )


def _oracle(workload: Workload, options: CompareOptions) -> tuple[Schedule, Outcome]:
    return find_schedule(
        options.spec(workload.slo),
        workload.arrivals,
        workload.slo,
        gpu_budget=options.gpu_budget,
        measured_from_s=workload.measured_from_s,
    )


def _run(
    workload: Workload, options: CompareOptions, autoscaler: _Prepared, first: FleetSize
) -> Outcome:
    return run_scaled(
        options.spec(workload.slo),
        workload.arrivals,
        autoscaler,
        workload.slo,
        first=first,
        gpu_budget=options.gpu_budget,
        measured_from_s=workload.measured_from_s,
    )


def _staying_vs_oracle(ratio: float, options: CompareOptions) -> float:
    workload = load_workload(STAYING, options)
    schedule, outcome = _oracle(workload, options)
    calm_gpus = _mean_gpus(schedule, _slots(CALM_S, SHIFT_S), options)
    reserve_hours = (ratio - 1) * calm_gpus * (SHIFT_S - CALM_S) / 3600
    return 1 + reserve_hours / outcome.gpu_hours


def _slots(start_s: float, end_s: float) -> slice:
    return slice(int(start_s / SLOT_S), int(end_s / SLOT_S))


def _mean_gpus(schedule: Schedule, slots: slice, options: CompareOptions) -> float:
    return fmean(
        _gpus(FleetSize(prefill, decode), options)
        for prefill, decode in zip(schedule.prefill[slots], schedule.decode[slots], strict=True)
    )


def _gpus(size: FleetSize, options: CompareOptions) -> float:
    return (size.prefill + size.decode) * options.profile.gpus
