"""A workload on pools that somebody resizes while it runs, and what came of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.simulate.model.causes import Causes, Witness
from benchmarks.simulate.model.fleet import Fleet, FleetSpec, feed
from benchmarks.simulate.model.history import Observation
from benchmarks.simulate.model.requests import Arrival, SimRequest
from router.slo import Slo

SAMPLE_PERIOD_S = 10.0
DRAIN_S = 300.0


@dataclass(frozen=True, slots=True)
class FleetSize:
    """Replicas that serve or are on their way there."""

    prefill: int
    decode: int


class Autoscaler(Protocol):
    """Decides the pools' sizes; called every `period_s`."""

    period_s: float

    def plan(self, seen: Observation) -> FleetSize: ...


class Fixed:
    """An autoscaler that never scales."""

    period_s = 60.0

    def __init__(self, size: FleetSize) -> None:
        self._size = size

    def plan(self, seen: Observation) -> FleetSize:
        return self._size


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One moment of a run, for its picture."""

    time_s: float
    num_prefill: int
    num_decode: int
    num_ongoing: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run came to."""

    num_requests: int
    attainment: float
    ttft_attainment: float
    itl_attainment: float
    gpu_hours: float
    num_scalings: int
    samples: tuple[Sample, ...]
    missed: tuple[tuple[float, bool, bool], ...]
    """Of each request that missed: its arrival, whether by TTFT, whether by ITL."""
    causes: Causes


def within_budget(size: FleetSize, spec: FleetSpec, gpu_budget: int) -> FleetSize:
    """At least one of each; where both do not fit, both get the same part of what they want."""
    assert spec.decode is not None
    prefill, decode = max(size.prefill, 1), max(size.decode, 1)
    wanted = prefill * spec.prefill.gpus + decode * spec.decode.gpus
    if wanted > gpu_budget:
        prefill = max(int(prefill * gpu_budget / wanted), 1)
        decode = max((gpu_budget - prefill * spec.prefill.gpus) // spec.decode.gpus, 1)
    return FleetSize(prefill, decode)


def run_scaled(
    spec: FleetSpec,
    workload: Sequence[Arrival],
    autoscaler: Autoscaler,
    slo: Slo,
    *,
    first: FleetSize,
    gpu_budget: int,
    measured_from_s: float = 0.0,
) -> Outcome:
    """Runs a workload from pools of size `first`, ready at once, on.

    What comes before `measured_from_s`, requests and GPU seconds, warms up and does not count.
    """
    fleet = Fleet(spec)
    decode = fleet.decode
    assert decode is not None
    for _ in range(first.prefill):
        fleet.prefill.start(is_ready=True)
    for _ in range(first.decode):
        decode.start(is_ready=True)
    samples: list[Sample] = []
    witness = Witness(fleet, slo)

    def spent() -> tuple[float, int]:
        return (
            fleet.prefill.gpu_seconds() + decode.gpu_seconds(),
            fleet.prefill.num_scalings + decode.num_scalings,
        )

    def scale() -> None:
        size = within_budget(autoscaler.plan(fleet.observe()), spec, gpu_budget)
        fleet.prefill.scale_to(size.prefill)
        decode.scale_to(size.decode)
        fleet.events.after(autoscaler.period_s, scale)

    def sample() -> None:
        samples.append(
            Sample(
                time_s=fleet.events.now_s,
                num_prefill=fleet.prefill.num_present,
                num_decode=decode.num_present,
                num_ongoing=fleet.num_ongoing,
            )
        )
        fleet.events.after(SAMPLE_PERIOD_S, sample)

    fleet.events.at(0.0, scale)
    fleet.events.at(0.0, sample)
    feed(fleet, workload)
    end_s = workload[-1].arrival_s
    fleet.events.run_until(measured_from_s)
    gpu_s_before, num_scalings_before = spent()
    fleet.events.run_until(end_s)
    gpu_s, num_scalings = spent()
    fleet.events.run_until(end_s + DRAIN_S)
    return _outcome(
        [each for each in fleet.requests if each.arrival.arrival_s >= measured_from_s],
        witness,
        gpu_hours=(gpu_s - gpu_s_before) / 3600,
        num_scalings=num_scalings - num_scalings_before,
        samples=tuple(samples),
    )


def _outcome(
    requests: Sequence[SimRequest],
    witness: Witness,
    *,
    gpu_hours: float,
    num_scalings: int,
    samples: tuple[Sample, ...],
) -> Outcome:
    missed = []
    slo = witness.slo
    num_late = num_slow = 0
    for request in requests:
        ttft_s, tpot_s = request.ttft_s, request.tpot_s
        is_late = ttft_s is None or ttft_s > slo.ttft_s
        is_slow = tpot_s is None or tpot_s > slo.itl_s
        num_late += is_late
        num_slow += is_slow
        if is_late or is_slow:
            missed.append((request.arrival.arrival_s, is_late, is_slow))
    count = len(requests)
    return Outcome(
        num_requests=count,
        attainment=1 - len(missed) / count,
        ttft_attainment=1 - num_late / count,
        itl_attainment=1 - num_slow / count,
        gpu_hours=gpu_hours,
        num_scalings=num_scalings,
        samples=samples,
        missed=tuple(missed),
        causes=witness.causes(requests),
    )
