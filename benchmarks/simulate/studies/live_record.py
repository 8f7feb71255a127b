"""What was measured on the live two-core cluster, and what the simulator says of the same requests.

Owns the record's JSON, the engine profile that follows from it, and the comparison. Both engines,
the router and the clients share the machine's cores: what prompts and answers take from each other
is measured with one beside the other, before the loads that are predicted.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, linear_regression, median

import msgspec

from benchmarks.simulate.model.fleet import FleetSpec, run_fixed
from benchmarks.simulate.model.profiles import DecodeRegime, EngineProfile
from benchmarks.simulate.model.requests import Arrival
from benchmarks.simulate.model.shared_cores import Contention
from router.costs import DecodeCost, PrefillCost

TOLERANCE = 0.20
MAX_BATCHED_TOKENS = 2048
"""As in `benchmarks/configs/simulate_live.yaml`."""
_KV_CAPACITY_TOKENS = 1_000_000
"""More than these loads fill."""


class LiveRecordError(ValueError):
    """A file is no record of live measurements."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Single:
    """One request at a time, of one shape. Medians in seconds."""

    prompt_tokens: int
    output_tokens: int
    ttft_s: float
    handover_s: float
    """From the first token, which is prefill's, to the second."""
    itl_s: float
    """From there on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """Long answers, alone and with one prompt after the other read beside them. In seconds."""

    num_answers: int
    """At once."""
    context_tokens: float
    """Of each, on average."""
    itl_s: float
    """Of the answers alone."""
    reading_itl_s: float
    """Of the answers, while a prompt is being read."""
    prompt_tokens: int
    ttft_s: float
    """Of a prompt beside them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRequest:
    """One request of an open-loop load, as its client saw it."""

    arrival_s: float
    """Since the load's start."""
    prompt_tokens: int
    output_tokens: int
    """At least two."""
    ttft_s: float
    itl_s: float
    """On average over its answer, the handover included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveLoad:
    """Requests that came at their own times, however many were still running."""

    rate: float
    """Requests per second, as planned."""
    requests: tuple[LiveRequest, ...]
    """In order of arrival."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRecord:
    """One session on one cluster of one prefill and one decode engine."""

    machine: str
    """Markdown."""
    prefill: PrefillCost
    """Of the prefill pool, as the router had fitted it to the engine's steps."""
    decode: DecodeCost
    """The same of the decode pool."""
    singles: tuple[Single, ...]
    besides: tuple[Beside, ...]
    loads: tuple[LiveLoad, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LivePoint:
    """One load: means over its requests, in seconds."""

    rate: float
    num_requests: int
    ttft_s: float
    simulated_ttft_s: float
    itl_s: float
    simulated_itl_s: float

    @property
    def holds(self) -> bool:
        """Whether both were predicted within `TOLERANCE`."""
        return all(
            abs(simulated / measured - 1) <= TOLERANCE
            for simulated, measured in (
                (self.simulated_ttft_s, self.ttft_s),
                (self.simulated_itl_s, self.itl_s),
            )
        )


def write_record(record: LiveRecord, path: Path) -> None:
    """As JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")


def read_record(path: Path) -> LiveRecord:
    """Reads what `write_record` wrote.

    Raises:
        LiveRecordError: it is something else; the text says what and where.
        OSError: it cannot be read.
    """
    try:
        record = msgspec.json.decode(path.read_bytes(), type=LiveRecord)
    except msgspec.DecodeError as error:
        raise LiveRecordError(f"{path}: {error}") from None
    measured = record.singles and record.besides and record.loads
    if not measured or not all(load.requests for load in record.loads):
        raise LiveRecordError(f"{path}: nothing was measured")
    return record


def fit_spec(record: LiveRecord) -> FleetSpec:
    """The cluster as it was measured.

    Engine steps cost what the router had fitted. What a single request takes beyond them is split
    by where it shows: between tokens it is what surrounds each step; before the first token, the
    way there; between the first and the second, the handover. What several answers at once take
    beyond one is added to each request's part of a step.
    """
    singles, besides = record.singles, record.besides

    def beyond_s(each: Beside) -> float:
        context = round(each.num_answers * each.context_tokens)
        return each.itl_s - record.decode.step_s(batch=each.num_answers, num_context_tokens=context)

    def step_s(single: Single) -> float:
        tokens = single.prompt_tokens + single.output_tokens // 2
        return decode.step_s(batch=1, num_context_tokens=tokens)

    batches = [each.num_answers for each in besides]
    per_request_s = linear_regression(batches, [beyond_s(each) for each in besides]).slope
    decode = replace(
        record.decode, per_request_s=max(0.0, record.decode.per_request_s + per_request_s)
    )
    overhead_s = _excess(each.itl_s - step_s(each) for each in singles)
    profile = EngineProfile(
        name="demo-cpu",
        source="the live cluster, fitted by its router",
        gpus=1,
        prefill=record.prefill,
        decode=(DecodeRegime(from_batch=0, cost=decode),),
        kv_capacity_tokens=_KV_CAPACITY_TOKENS,
        kv_bytes_per_token=0,  # a transfer's time is in the handover
        max_batched_tokens=MAX_BATCHED_TOKENS,
        overhead_s=overhead_s,
        overhead_per_token_s=0.0,
        prefill_overhead_s=0.0,
        link_latency_s=0.0,
    )
    edge_s = _excess(each.ttft_s - profile.idle_ttft_s(each.prompt_tokens) for each in singles)
    return FleetSpec(
        prefill=profile,
        decode=profile,
        edge_s=edge_s,
        handover_s=_excess(each.handover_s - step_s(each) - overhead_s for each in singles),
        contention=Contention(
            prefill=_factor(
                (each.ttft_s - edge_s) / profile.idle_ttft_s(each.prompt_tokens) for each in besides
            ),
            decode=_factor(each.reading_itl_s / each.itl_s for each in besides),
        ),
    )


def compare_loads(record: LiveRecord) -> list[LivePoint]:
    """Simulates the very requests of each load."""
    spec = fit_spec(record)
    return [_compare(load, spec) for load in record.loads]


def format_costs(record: LiveRecord) -> str:
    """What engine steps cost, in a line."""
    prefill, decode = record.prefill, record.decode
    return (
        f"prefill {1e3 * prefill.base_s:.2f} ms + {1e6 * prefill.per_token_s:.1f} µs a token"
        f" + {1e9 * prefill.per_token_squared_s:.2f} ns a token squared;"
        f" decode {1e3 * decode.base_s:.2f} ms + {1e3 * decode.per_request_s:.2f} ms a request"
        f" + {1e6 * decode.per_context_token_s:.2f} µs a context token"
    )


def format_points(points: Sequence[LivePoint]) -> str:
    """The points as a Markdown table."""
    return "\n".join(
        (
            "| requests/s | requests | TTFT ms | simulated | ITL ms | simulated |"
            f" within {TOLERANCE:.0%} |",
            "|---|---|---|---|---|---|---|",
            *(
                f"| {each.rate:.1f} | {each.num_requests} | {1e3 * each.ttft_s:.1f} |"
                f" {1e3 * each.simulated_ttft_s:.1f} | {1e3 * each.itl_s:.2f} |"
                f" {1e3 * each.simulated_itl_s:.2f} | {'yes' if each.holds else 'no'} |"
                for each in points
            ),
        )
    )


def _compare(load: LiveLoad, spec: FleetSpec) -> LivePoint:
    workload = [
        Arrival(each.arrival_s, each.prompt_tokens, each.output_tokens) for each in load.requests
    ]
    fleet = run_fixed(spec, workload, num_prefill=1, num_decode=1)
    return LivePoint(
        rate=load.rate,
        num_requests=len(load.requests),
        ttft_s=fmean(each.ttft_s for each in load.requests),
        simulated_ttft_s=fmean(_known(each.ttft_s) for each in fleet.requests),
        itl_s=fmean(each.itl_s for each in load.requests),
        simulated_itl_s=fmean(_known(each.tpot_s) for each in fleet.requests),
    )


def _excess(seconds: Iterable[float]) -> float:
    """The median, as a time that has to pass: none where the parts already take longer."""
    return max(0.0, median(seconds))


def _factor(factors: Iterable[float]) -> float:
    """The mean: nothing gets faster by company."""
    return max(1.0, fmean(factors))


def _known(seconds: float | None) -> float:
    assert seconds is not None, "every simulated request ends"
    return seconds
