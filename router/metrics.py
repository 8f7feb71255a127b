"""What a router measures of the requests that pass through it.

Owns the router's prometheus_client metrics (the text of `/metrics`) and the running mean of answer
lengths. TTFT runs from the router's receipt of the parsed request to the first token handed on.
"""

import time
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput

from router.cost_fit import PoolCost
from router.handoff import Route
from router.phases import RequestPhase
from router.policies import RoutePlan
from router.pool import Pool
from router.request import RequestState
from router.traffic import TrafficMeter

_LATENCY_BUCKETS_S = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5,
    0.75, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip


COMPLETE = ("stop", "length", "repetition")
"""How answers end that are whole."""


class RouterMetrics:
    """Counters and histograms of one router."""

    def __init__(self, registry: CollectorRegistry, traffic: TrafficMeter) -> None:
        self._traffic = traffic

        def histogram(name: str, text: str, labels: Iterable[str] = ()) -> Histogram:
            return Histogram(name, text, labels, buckets=_LATENCY_BUCKETS_S, registry=registry)

        self._ttft = histogram(
            "pdserve_ttft_seconds", "From the router's receipt of a request to its first token."
        ).observe
        self._itl = histogram("pdserve_itl_seconds", "From one token to the next.").observe
        self._handover = histogram(
            "pdserve_handover_seconds", "From prefill's first token to decode's first."
        ).observe
        phase = histogram(
            "pdserve_phase_seconds", "Time that requests spent in a phase.", ("phase",)
        )
        self._phase = {each: phase.labels(each.value).observe for each in RequestPhase}
        queue = histogram("pdserve_queue_seconds", "Waiting in an engine's own queue.", ("pool",))
        self._queue = {pool: queue.labels(pool).observe for pool in ("prefill", "decode")}
        self._routes = Counter(
            "pdserve_routes",
            "Requests routed, by route and reason.",
            ("route", "reason"),
            registry=registry,
        )
        self._picks = Counter(
            "pdserve_picks",
            "Replicas chosen to prefill, by reason.",
            ("pool", "reason"),
            registry=registry,
        )
        self.called_back = Counter(
            "pdserve_called_back",
            "Prompts rerouted at a replica's acknowledgement: other routers had sent more there.",
            registry=registry,
        ).inc
        self._refused = Counter(
            "pdserve_refused", "Requests refused with 400, 429 or 503, by reason.", ("reason",),
            registry=registry,
        )  # fmt: skip
        self._ended = Counter(
            "pdserve_requests", "Requests ended, by how.", ("end",), registry=registry
        )
        self._tokens = Counter(
            "pdserve_output_tokens", "Tokens sent to clients.", registry=registry
        )
        self._moves = Counter(
            "pdserve_moves",
            "Failovers: requests that lost their engine and go on in another, by cause.",
            ("cause",),
            registry=registry,
        )
        self._recovery = histogram(
            "pdserve_recovery_seconds", "From the loss of an engine to the request's next token."
        ).observe
        self._inflight = Gauge(
            "pdserve_inflight", "Requests that are in a phase now.", ("phase",), registry=registry
        )
        self._mean_output_tokens = 128.0
        self._mean_handover_s = 0.01

    def expected_output_tokens(self, max_tokens: int | None) -> int:
        """How long an answer is likely to be: what recent ones were, at most `max_tokens`."""
        expected = int(self._mean_output_tokens) or 1
        return expected if max_tokens is None else min(expected, max_tokens)

    @property
    def handover_s(self) -> float:
        """How long decode took lately from prefill's first token to its own."""
        return self._mean_handover_s

    def routed(self, state: RequestState, reader: RoutePlan, *, prefill_s: float) -> None:
        """A request is on its way to the replica that reads its prompt.

        Args:
            prefill_s: engine seconds that it asks of the prefill pool.
        """
        if state.attempt == 0:
            self._traffic.arrived(prefill_s=prefill_s, num_tokens=state.num_tokens)
        self._routes.labels(state.plan.route.name.lower(), state.plan.reason).inc()
        pool = "decode" if state.plan.route is Route.DECODE_ONLY else "prefill"
        self._picks.labels(pool, reader.reason).inc()

    def refused(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def phase_entered(self, state: RequestState, phase: RequestPhase) -> None:
        now_s = time.monotonic()
        if state.phase is not RequestPhase.RECEIVED:
            self._inflight.labels(state.phase.value).dec()
            self._phase[state.phase](now_s - state.phase_since_s)
        if phase is not RequestPhase.ENDED:
            self._inflight.labels(phase.value).inc()

    def num_inflight(self) -> float:
        """What the gauge of the phases adds up to."""
        (family,) = self._inflight.collect()
        return float(sum(sample.value for sample in family.samples))

    def queued(self, state: RequestState, output: EngineCoreOutput) -> None:
        """Takes the engine's own times of queueing from a phase's first output."""
        times = {event.type: event.timestamp for event in output.events or ()}
        start = times.get(EngineCoreEventType.QUEUED)
        end = times.get(EngineCoreEventType.SCHEDULED)
        if start is not None and end is not None and state.replica is not None:
            self._queue[state.replica.pool.name](end - start)

    def moved(self, state: RequestState, cause: str) -> None:
        self._moves.labels(cause).inc()
        state.moved_s = state.moved_s or time.monotonic()

    def tokens_out(self, state: RequestState, tokens: list[int]) -> None:
        """Notes the tokens that the client is given, and when."""
        num_tokens = len(tokens)
        if num_tokens == 0:
            return
        now_s = time.monotonic()
        if state.moved_s is not None:
            self._recovery(now_s - state.moved_s)
            state.moved_s = None
        if state.last_token_s is None:
            self._ttft(now_s - state.received_s)
            self._traffic.first_token(state.replica, now_s - state.received_s)
            state.first_token_s = now_s
        else:
            gap_s = now_s - state.last_token_s
            self._itl(gap_s / num_tokens)
            if (
                state.num_output_tokens == 1
                and state.num_moves == 0
                and state.plan.route is Route.PREFILL_FIRST
            ):
                self._handover(gap_s)
                self._mean_handover_s += 0.02 * (gap_s - self._mean_handover_s)
        state.last_token_s = now_s
        state.output_token_ids += tokens
        self._tokens.inc(num_tokens)

    def ended(self, state: RequestState, outcome: str) -> None:
        self._ended.labels(outcome).inc()
        if outcome in COMPLETE:
            self._mean_output_tokens += 0.02 * (state.num_output_tokens - self._mean_output_tokens)
            if state.first_token_s is not None and state.last_token_s is not None:
                writing_s = state.last_token_s - state.first_token_s
                self._traffic.ended(state.decode, state.num_output_tokens, writing_s)


def unready_pairs_gauge(registry: CollectorRegistry) -> Gauge:
    """Of pairs that routing leaves alone; whoever knows them sets its function."""
    return Gauge(
        "pdserve_unready_pairs",
        "Pairs of a prefill and a decode replica that cannot transfer KV now.",
        registry=registry,
    )


class PoolMetrics(Collector):  # type: ignore[misc]
    """Gauges of the pools and their replicas, read at each scrape; those that left are gone."""

    def __init__(self, pools: tuple[Pool, ...], registry: CollectorRegistry) -> None:
        self._pools = pools
        registry.register(self)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        replicas = GaugeMetricFamily("pdserve_replicas", "Live replicas.", labels=["pool"])
        labels = ["pool", "replica"]
        work = GaugeMetricFamily(
            "pdserve_replica_work_seconds",
            "Predicted outstanding work of a replica, by this router's ledger.",
            labels=labels,
        )
        sent = GaugeMetricFamily(
            "pdserve_replica_sent", "Requests of this router that a replica has.", labels=labels
        )
        running = GaugeMetricFamily(
            "pdserve_replica_running", "Requests in a replica's batch.", labels=labels
        )
        waiting = GaugeMetricFamily(
            "pdserve_replica_waiting", "Requests that wait in a replica's engine.", labels=labels
        )
        usage = GaugeMetricFamily(
            "pdserve_replica_kv_usage_fraction", "KV blocks in use.", labels=labels
        )
        cost = GaugeMetricFamily(
            "pdserve_cost_seconds",
            "The cost model: engine time of each thing that a step computes, fitted to the steps.",
            labels=["pool", "term"],
        )
        transfer = GaugeMetricFamily(
            "pdserve_kv_read_cost_seconds",
            "The cost of decode's KV reads, fitted to the reads: per read, and per GB.",
            labels=["way", "term"],
        )
        for pool in self._pools[:1]:  # The other one shares what is known of transfers.
            for is_near, read in pool.transfers.measured():
                way = "within_node" if is_near else "between_nodes"
                transfer.add_metric([way, "read"], read.fixed_s)
                transfer.add_metric([way, "gigabyte"], read.per_byte_s * 1e9)
        for pool in self._pools:
            replicas.add_metric([pool.name], len(pool.ledger))
            for term, seconds in _cost_terms(pool.cost):
                cost.add_metric([pool.name, term], seconds)
            for replica in pool:
                own = [pool.name, replica.replica_id]
                work.add_metric(own, replica.work_s)
                sent.add_metric(own, pool.ledger.num_sent(replica.replica_id))
                running.add_metric(own, replica.load.num_running)
                waiting.add_metric(own, replica.load.num_waiting)
                usage.add_metric(own, replica.load.kv_usage_fraction)
        yield from (replicas, cost, transfer, work, sent, running, waiting, usage)


def _cost_terms(cost: PoolCost) -> Iterator[tuple[str, float]]:
    """See router.costs: a step that reads prompts pays `prompt`, any other one `step`."""
    yield "prompt", cost.prefill.base_s
    yield "prompt_token", cost.prefill.per_token_s
    yield "prompt_token_squared", cost.prefill.per_token_squared_s
    yield "step", cost.decode.base_s
    yield "request", cost.decode.per_request_s
    yield "context_token", cost.decode.per_context_token_s
