"""What a router measures of the requests that pass through it.

Owns the router's prometheus_client metrics (the text of `/metrics`). Only observes: it is told what
has happened, changes no request, and nobody decides by it. TTFT runs from the router's receipt of
the parsed request to the first token handed on.
"""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput

from kvtransfer.phase import PHASES, Phase
from router.cost_fit import PoolCost
from router.phases import RequestPhase
from router.policies import ReplicaPlan
from router.pool import Pool
from router.request import PhaseChange, TokensOut
from router.routes import Route, RoutePlan

_LATENCY_BUCKETS_S = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5,
    0.75, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip


class RouterMetrics:
    """Counters and histograms of one router."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str, labels: Iterable[str] = ()) -> Histogram:
            return Histogram(name, text, labels, buckets=_LATENCY_BUCKETS_S, registry=registry)

        self._ttft = histogram(
            "pdserve_ttft_seconds", "From the router's receipt of a request to its first token."
        ).observe
        self._itl = histogram("pdserve_itl_seconds", "From one token to the next.").observe
        self._transfer = histogram(
            "pdserve_handover_seconds", "From prefill's first token to decode's first."
        ).observe
        phase = histogram(
            "pdserve_phase_seconds", "Time that requests spent in a phase.", ("phase",)
        )
        self._phase = {each: phase.labels(each.value).observe for each in RequestPhase}
        queue = histogram("pdserve_queue_seconds", "Waiting in an engine's own queue.", ("pool",))
        self._queue = {pool: queue.labels(pool).observe for pool in PHASES}
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
        self.rerouted = Counter(
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
        self._failovers = Counter(
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

    def routed(self, plan: RoutePlan, prefill_at: ReplicaPlan) -> None:
        """A request is on its way to the replica that prefills."""
        self._routes.labels(plan.route.name.lower(), plan.reason).inc()
        pool = "decode" if plan.route is Route.DECODE_ONLY else "prefill"
        self._picks.labels(pool, prefill_at.reason).inc()

    def refused(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def phase_changed(self, change: PhaseChange) -> None:
        if change.before is not RequestPhase.RECEIVED:
            self._inflight.labels(change.before.value).dec()
            self._phase[change.before](change.seconds)
        if change.after is not RequestPhase.ENDED:
            self._inflight.labels(change.after.value).inc()

    def num_inflight(self) -> float:
        """What the gauge of the phases adds up to."""
        (family,) = self._inflight.collect()
        return float(sum(sample.value for sample in family.samples))

    def queued(self, pool: Phase, output: EngineCoreOutput) -> None:
        """Takes the engine's own times of queueing from a phase's first output."""
        times = {event.type: event.timestamp for event in output.events or ()}
        start = times.get(EngineCoreEventType.QUEUED)
        end = times.get(EngineCoreEventType.SCHEDULED)
        if start is not None and end is not None:
            self._queue[pool](end - start)

    def failed_over(self, cause: str) -> None:
        self._failovers.labels(cause).inc()

    def tokens_out(self, out: TokensOut) -> None:
        """A client was given tokens."""
        if out.recovery_s is not None:
            self._recovery(out.recovery_s)
        if out.ttft_s is not None:
            self._ttft(out.ttft_s)
        if out.gap_s is not None:
            self._itl(out.gap_s / out.num)
        if out.transfer_s is not None:
            self._transfer(out.transfer_s)
        self._tokens.inc(out.num)

    def ended(self, outcome: str) -> None:
        self._ended.labels(outcome).inc()


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
