"""What a router does with a thousand replicas: decisions per second, memory, and what gives first.

Measured on the production ledger and policies, in this process, on this machine: a day of traffic
is a rate per router times 86,400, and what counts is how that rate compares with what one can do.
"""

import random
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.simulate.model.profiles import LLAMA_8B_H100
from benchmarks.simulate.studies.progress import with_progress
from benchmarks.simulate.workloads.demand import MeanShape, decode_requests_per_s
from router.ledger import Ledger
from router.policies import POLICIES

PROMPT_TOKENS, OUTPUT_TOKENS = 2000, 300
ITL_S = 0.05
LOAD = 0.7
"""Of the replicas, over the day's mean."""
REPORTS_PER_S = 20.0
"""Of one decode replica to one router, at an ITL of `ITL_S`: each step's outputs carry one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleReport:
    """What was measured, and what the traffic asks of one router."""

    num_replicas: int
    num_routers: int
    requests_per_s: float
    """Of the whole cluster."""
    decisions_per_s: float
    """That one router can make."""
    decision_requests: float
    """Decisions per second that its part of the traffic asks for: two a request."""
    reports_per_s: float
    """That one router can take in."""
    reports_asked: float
    state_bytes: int
    """Of one router's ledgers, with its outstanding requests."""

    @property
    def core_share(self) -> float:
        """Of one core, for routing alone."""
        return (
            self.decision_requests / self.decisions_per_s + self.reports_asked / self.reports_per_s
        )


def measure_scale(*, num_replicas: int, num_routers: int, seconds: float) -> ScaleReport:
    """Measures for `seconds` each; replicas are split by the work of prefill and decode."""
    shape = _shape()
    per_decode = decode_requests_per_s(LLAMA_8B_H100, shape, ITL_S)
    per_prefill = 1 / shape.prefill_s
    decode = max(round(num_replicas * per_prefill / (per_prefill + per_decode)), 1)
    prefill = max(num_replicas - decode, 1)
    requests_per_s = LOAD * min(prefill * per_prefill, decode * per_decode)
    outstanding = round(requests_per_s / num_routers * OUTPUT_TOKENS * ITL_S)
    tracemalloc.start()
    ledger, _prefill = _filled(prefill, decode, num_routers, outstanding)
    state_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    rng, policy = random.Random(0), POLICIES["p2c"]

    def decide(turn: int) -> None:
        plan = policy(ledger.snapshot(float(turn), request_s=1e-4), rng)
        ledger.add(plan.replica_id, f"new-{turn}", 1e-4, now_s=float(turn))
        ledger.complete(plan.replica_id, f"new-{turn}")

    def report(turn: int) -> None:
        ledger.report(
            _replica_id("decode", turn % decode), others_work_s=1e-3, progress_s=0.0, now_s=turn
        )

    rates = [
        _rate(action, seconds)
        for action in with_progress((decide, report), total=2, what="measurements")
    ]
    return ScaleReport(
        num_replicas=num_replicas,
        num_routers=num_routers,
        requests_per_s=requests_per_s,
        decisions_per_s=rates[0],
        decision_requests=2 * requests_per_s / num_routers,
        reports_per_s=rates[1],
        # A replica reports to the routers that have requests there.
        reports_asked=REPORTS_PER_S * min(decode, outstanding),
        state_bytes=state_bytes,
    )


def format_scale(report: ScaleReport) -> str:
    """The report as Markdown, with what gives first."""
    decisions = report.decision_requests / report.decisions_per_s
    reports = report.reports_asked / report.reports_per_s
    first = "reports" if reports > decisions else "decisions"
    return "\n".join(
        (
            f"# {report.num_replicas} replicas, {report.num_routers} routers",
            "",
            f"{report.requests_per_s:,.0f} requests/s, {report.requests_per_s * 86_400:,.0f} a day"
            f" (prompts of {PROMPT_TOKENS}, answers of {OUTPUT_TOKENS} tokens, load {LOAD:g}).",
            "",
            "| one router | asked for | can do | share of a core |",
            "|---|---|---|---|",
            f"| decisions/s | {report.decision_requests:,.0f} | {report.decisions_per_s:,.0f} |"
            f" {decisions:.1%} |",
            f"| load reports/s | {report.reports_asked:,.0f} | {report.reports_per_s:,.0f} |"
            f" {reports:.1%} |",
            f"| memory of its ledgers | {report.state_bytes / 1e6:.1f} MB | | |",
            "",
            f"What gives first in routing: {first}; at this size it takes"
            f" {report.core_share:.1%} of a core. Tokens that pass through the router and its"
            f" {report.num_replicas} connections are not in these numbers.",
            "",
        )
    )


def _shape() -> MeanShape:
    prefill_s = LLAMA_8B_H100.prefill.seconds(num_uncached=PROMPT_TOKENS, num_tokens=PROMPT_TOKENS)
    return MeanShape(prompt_tokens=PROMPT_TOKENS, output_tokens=OUTPUT_TOKENS, prefill_s=prefill_s)


def _filled(
    num_prefill: int, num_decode: int, num_routers: int, outstanding: int
) -> tuple[Ledger, Ledger]:
    """One router's ledgers of decode, with so many requests, and of prefill."""
    decode, prefill = Ledger(num_routers=num_routers, drains=False), Ledger(num_routers=num_routers)
    for name, ledger, count in (
        ("decode", decode, num_decode),
        ("prefill", prefill, num_prefill),
    ):
        for index in range(count):
            ledger.insert(_replica_id(name, index), 0.0)
    for request in range(outstanding):
        decode.add(_replica_id("decode", request % num_decode), str(request), 1e-4, now_s=0.0)
    return decode, prefill


def _replica_id(pool: str, index: int) -> str:
    return f"{pool}-{index:05d}"


def _rate(action: Callable[[int], None], seconds: float) -> float:
    start_s, turn = time.perf_counter(), 0
    while time.perf_counter() - start_s < seconds:
        for _ in range(10):
            action(turn)
            turn += 1
    return turn / (time.perf_counter() - start_s)
