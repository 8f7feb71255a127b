"""The simulated cluster: requests go through routers, a prefill pool and a decode pool.

Owns the pools, the routers, and the requests between engines. Decides nothing: where requests go is
`router.placement`'s business, as in production, and the pools' sizes are set from outside. With
`decode` None, one pool of engines does both phases, as a plain vLLM server would.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.simulate.model.engine import Engine
from benchmarks.simulate.model.event_queue import EventQueue
from benchmarks.simulate.model.history import History, Observation
from benchmarks.simulate.model.pools import ReplicaState, SimPool, SimReplica
from benchmarks.simulate.model.profiles import EngineProfile
from benchmarks.simulate.model.requests import Arrival, SimRequest
from benchmarks.simulate.model.routing import SPLIT, WHOLE, SimRouter
from benchmarks.simulate.model.shared_cores import Contention, share_cores
from router.deadline_order import deadline_s, latest_start_ms
from router.phases import RequestPhase
from router.placement import Placement
from router.reroute import MAX_ACKNOWLEDGEMENTS
from router.routes import Route
from router.settings import RoutingSettings
from router.slo import Slo
from router.transfer_fit import Reads


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """Replicas of each pool take turns on them. Within one, KV moves at the profile's rate."""

    num: int
    bytes_per_s: float
    """Between two."""
    seen: bool = True
    """By routers, which are told what reads take, as in production."""

    def of(self, replica: SimReplica) -> str:
        return str(replica.index % self.num)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSpec:
    """What is simulated."""

    prefill: EngineProfile
    decode: EngineProfile | None
    num_routers: int = 1
    report_period_s: float = 1.0
    """How old a report of what other routers sent may get."""
    reports_with_outputs: bool = True
    """Replicas report their load to a router with each first token that they send it."""
    policy: str = "p2c"
    edge_s: float = 0.0
    """Of every TTFT outside of engines: the proxy, tokenising, sending."""
    handover_s: float = 0.0
    """From the first token to the decode engine's queue."""
    ttft_s: float | None = None
    """The target that prefill engines order prompts by, as production does; None for engines that
    take them as they come, as plain vLLM does."""
    itl_s: float | None = None
    """The target within which decode may read prompts itself, as in production by default; None
    has prefill read them all."""
    nodes: Nodes | None = None
    """None for one node, or a network that makes no difference."""
    contention: Contention | None = None
    """Of one prefill and one decode engine on the same cores; None for engines of their own."""
    seed: int = 0

    @property
    def settings(self) -> RoutingSettings:
        """What routers go by."""
        if self.ttft_s is None or self.itl_s is None or self.decode is None:
            return RoutingSettings()
        return RoutingSettings(slo=Slo(ttft_s=self.ttft_s, itl_s=self.itl_s), local_prefill=True)

    def until_decode_s(self, num_tokens: int) -> float:
        """From a first token in prefill to decode having the KV of so many tokens."""
        decode = self.decode or self.prefill
        return self.handover_s + decode.transfer_s(num_tokens)


class Fleet:
    """One run. An `EngineListener` and a `PoolWatcher`."""

    def __init__(self, spec: FleetSpec, events: EventQueue | None = None) -> None:
        self.spec = spec
        self.events = events or EventQueue()
        self.history = History()
        self.requests: list[SimRequest] = []
        self.prefill = SimPool("prefill", self.events, spec.prefill, self, self)
        self.decode = (
            SimPool("decode", self.events, spec.decode, self, self) if spec.decode else None
        )
        self.num_decoding = 0
        self.num_read_in_decode = 0
        self.num_near = 0
        """Handovers within a node."""
        self.routers = [
            SimRouter(
                each,
                (self.prefill, self.decode or self.prefill),
                lambda: self.events.now_s,
                policy=spec.policy,
                num_routers=spec.num_routers,
                settings=spec.settings,
                transfer_s=spec.until_decode_s,
                kv_bytes_per_token=(
                    spec.prefill.kv_bytes_per_token if spec.nodes and spec.nodes.seen else None
                ),
                seed=spec.seed,
            )
            for each in range(spec.num_routers)
        ]
        self._held: dict[str, deque[SimRequest]] = {"prefill": deque(), "decode": deque()}
        self._num_ended = 0
        self._prefilled_by: dict[int, SimReplica] = {}

    @property
    def pools(self) -> list[SimPool]:
        return [self.prefill, *([self.decode] if self.decode else [])]

    @property
    def num_ongoing(self) -> int:
        """Requests that have arrived and not ended."""
        return len(self.requests) - self._num_ended

    @property
    def prefill_backlog_s(self) -> float:
        """Predicted engine seconds of prompts that routers sent or hold."""
        sent_s = sum(each.outstanding.total_s for each in self.prefill.present)
        return sent_s + sum(self._prefill_s(each) for each in self._held["prefill"])

    def submit(self, arrival: Arrival) -> None:
        """A request arrives now."""
        request = SimRequest(arrival, len(self.requests))
        request.router_id = request.request_id % self.spec.num_routers
        self.requests.append(request)
        self.history.arrived(arrival)
        self.events.after(self.spec.edge_s, lambda: self._route(request))

    def fail(self, replica: SimReplica) -> None:
        """A replica dies: what it had starts again elsewhere, after the tokens it got so far."""
        pool = self._pool_of(replica)
        left = replica.engine.fail()
        pool.fail(replica)
        for request in left:
            if request.phase is not RequestPhase.PREFILLING:
                self.num_decoding -= 1
                self._release_source(request)
            request.num_moves += 1
            self._route(request)

    def observe(self) -> Observation:
        """What a planner may know now."""
        prefill = self.prefill.view(len(self._held["prefill"]))
        decode = self.decode.view(len(self._held["decode"])) if self.decode else prefill
        return Observation(
            now_s=self.events.now_s,
            prefill=prefill,
            decode=decode,
            history=self.history,
            prefill_backlog_s=self.prefill_backlog_s,
            num_decoding=self.num_decoding + len(self._held["decode"]),
        )

    # From phase to phase.

    def _route(self, request: SimRequest) -> None:
        """To the replica that is to read its prompt."""
        if not self.prefill.ready:
            request.phase = RequestPhase.WAITING
            self._held["prefill"].append(request)
            return
        router = self.routers[request.router_id]
        placement = self.place(router, request)
        if not request.num_moves:
            self.history.prefill_s.add(self.events.now_s, placement.prefill_s)
        if placement.plan.route is Route.DECODE_ONLY:
            self._read_in_decode(router, request, placement)
        else:
            self._read_in_prefill(router, request, placement)

    def place(self, router: SimRouter, request: SimRequest) -> Placement:
        """Its way, once replicas have said what they have: as in production but for the round trip
        that each answer takes."""
        plan = SPLIT if router.decode.is_open else WHOLE
        placement = router.placer.place(request, plan)
        for _ in range(MAX_ACKNOWLEDGEMENTS if router.asks_acknowledgements else 0):
            if placement.plan.route is Route.DECODE_ONLY:
                break
            replica_id = placement.prefill_at.replica_id
            router.prefill.hear(replica_id)
            here_s = router.prefill.ledger.work_s(replica_id) + placement.prefill_at.request_s
            better = router.placer.better(request, plan, here_s=here_s)
            if better is None:
                break
            placement = better
        return placement

    def _read_in_prefill(
        self, router: SimRouter, request: SimRequest, placement: Placement
    ) -> None:
        prefill_s = placement.prefill_at.request_s
        request.step_limit_s = prefilled_by_s = None
        if self.spec.ttft_s is not None:
            request.priority = latest_start_ms(
                arrival_s=request.arrival.arrival_s, prefill_s=prefill_s, ttft_s=self.spec.ttft_s
            )
            prefilled_by_s = deadline_s(request.priority, prefill_s=prefill_s)
        replica_id = placement.prefill_at.replica_id
        router.prefill.add(request, replica_id, prefill_s, deadline_s=prefilled_by_s)
        replica = self.prefill.by_id[replica_id]
        request.phase = RequestPhase.PREFILLING
        request.hands_over = self.decode is not None
        self._prefilled_by[request.request_id] = replica
        replica.engine.submit(request)

    def _read_in_decode(self, router: SimRouter, request: SimRequest, placement: Placement) -> None:
        assert self.decode is not None
        replica_id, request_s = placement.prefill_at.replica_id, placement.prefill_at.request_s
        request.phase = RequestPhase.DECODING
        request.step_limit_s, request.priority = placement.step_limit_s, 0
        request.hands_over = False
        self.num_decoding += 1
        self.num_read_in_decode += 1
        share_s = self._share_s(request) + request_s / router.predictor.output_tokens(None)
        router.decode.prefilling.setdefault(replica_id, {})[request.request_id] = request_s
        router.decode.add(request, replica_id, share_s)
        self.decode.by_id[replica_id].engine.submit(request)

    def prefilled(self, engine: Engine, request: SimRequest) -> None:
        """EngineListener: the first token is out, or the first after a move or preemption."""
        replica = self._prefilled_by.get(request.request_id)
        if request.num_output_tokens == 1:
            self.history.first_token(request)
        if replica is not None and replica.engine is engine:
            router = self.routers[request.router_id]
            if self.decode is not None or not request.num_left:
                router.prefill.complete(request, replica.replica_id)
            if self.spec.reports_with_outputs:
                router.prefill.hear(replica.replica_id)
            if not request.num_left:
                del self._prefilled_by[request.request_id]
                self._end(request, self.prefill, replica)
            elif self.decode is not None:
                self.events.after(self.spec.handover_s, lambda: self._to_decode(request))
            else:
                request.phase = RequestPhase.DECODING
                self.num_decoding += 1
        else:  # read by decode, or computed anew where it had been preempted
            assert self.decode is not None
            reader = self.decode.by_engine[id(engine)].replica_id
            prefilling = self.routers[request.router_id].decode.prefilling
            prefilling.get(reader, {}).pop(request.request_id, None)
            if not request.num_left:
                self.finished(engine, request)

    def _to_decode(self, request: SimRequest) -> None:
        assert self.decode is not None
        if not self.decode.ready:
            request.phase = RequestPhase.WAITING
            self._held["decode"].append(request)
            return
        request.phase = RequestPhase.TRANSFERRING
        request.hands_over = False
        request.priority = 0  # decode takes requests as they come
        self.num_decoding += 1
        router = self.routers[request.router_id]
        source = router.prefill[self._prefilled_by[request.request_id].replica_id]
        share_s = self._share_s(request)
        replica_id = router.placer.decode_replica(request, source, share_s)
        assert replica_id is not None, "one is ready"
        router.decode.add(request, replica_id, share_s)
        replica = self.decode.by_id[replica_id]
        self._set_out(request, replica)
        replica.engine.submit(request)

    def _set_out(self, request: SimRequest, reader: SimReplica) -> None:
        """Its KV takes the way between these replicas; routers will know what that took."""
        source, nodes = self._prefilled_by.get(request.request_id), self.spec.nodes
        if source is None or nodes is None:
            return
        is_near = nodes.of(source) == nodes.of(reader)
        request.link_bytes_per_s = None if is_near else nodes.bytes_per_s
        self.num_near += is_near
        profile = reader.engine.profile
        num_bytes = request.num_computed_tokens * profile.kv_bytes_per_token
        rate = request.link_bytes_per_s or profile.link_bytes_per_s
        reads = Reads(num=1, num_bytes=num_bytes, seconds=profile.link_latency_s + num_bytes / rate)
        for router in self.routers:
            router.transfers.observe(
                reads,
                prefill=source.replica_id,
                decode=reader.replica_id,
                now_s=self.events.now_s,
            )

    def pulled(self, engine: Engine, request: SimRequest) -> None:
        """EngineListener: decode has the KV, prefill may free it."""
        self._release_source(request)
        request.phase = RequestPhase.DECODING

    def finished(self, engine: Engine, request: SimRequest) -> None:
        """EngineListener: the last token is out."""
        self.num_decoding -= 1
        pool = self.decode or self.prefill
        replica = pool.by_engine[id(engine)]
        self._prefilled_by.pop(request.request_id, None)
        self.routers[request.router_id].of(pool).complete(request, replica.replica_id)
        self._end(request, pool, replica)

    def _end(self, request: SimRequest, pool: SimPool, replica: SimReplica) -> None:
        request.phase = RequestPhase.ENDED
        self._num_ended += 1
        self.history.ended(request)
        pool.drained(replica)

    def _release_source(self, request: SimRequest) -> None:
        source = self._prefilled_by.pop(request.request_id, None)
        if source is not None and source.engine.is_alive:
            source.engine.release(request.num_computed_tokens)
            self.prefill.drained(source)

    def _share_s(self, request: SimRequest) -> float:
        """What it adds to each decode step. `Placer.decode_share_s` also reckons with what its
        answer grows to; with that, the published comparisons would have to be made again."""
        assert self.decode is not None
        cost = self.decode.profile.decode[0].cost
        return cost.share_s(num_context_tokens=request.num_tokens)

    def _prefill_s(self, request: SimRequest) -> float:
        num_tokens = request.num_tokens
        cost = self.spec.prefill.prefill
        return cost.seconds(num_uncached=num_tokens, num_tokens=num_tokens)

    # What replicas and routers tell each other.

    def _pool_of(self, replica: SimReplica) -> SimPool:
        return next(pool for pool in self.pools if pool.by_id.get(replica.replica_id) is replica)

    def joined(self, pool: SimPool, replica: SimReplica) -> None:
        """PoolWatcher: requests that waited for a replica go to it."""
        nodes = self.spec.nodes
        for router in self.routers:
            router.of(pool).joined(replica.replica_id, nodes.of(replica) if nodes else None)
        self._report(pool, replica)
        held = self._held[pool.name]
        submit = self._route if pool is self.prefill else self._to_decode
        while held:
            submit(held.popleft())

    def closed(self, pool: SimPool, replica: SimReplica) -> None:
        """PoolWatcher."""
        for router in self.routers:
            router.of(pool).ledger.close(replica.replica_id)

    def gone(self, pool: SimPool, replica: SimReplica) -> None:
        """PoolWatcher."""
        for router in self.routers:
            router.of(pool).left(replica.replica_id)

    def _report(self, pool: SimPool, replica: SimReplica) -> None:
        """Reports to all routers, now and every period; each router at its own time."""
        if replica.state is not ReplicaState.READY:
            return
        period_s = self.spec.report_period_s
        for router in self.routers:
            offset_s = period_s * (router.router_id + 1) / len(self.routers)
            self.events.after(offset_s, partial(self._report_to, router, pool, replica))
        self.events.after(period_s, lambda: self._report(pool, replica))

    def _report_to(self, router: SimRouter, pool: SimPool, replica: SimReplica) -> None:
        if replica.state is ReplicaState.READY:
            router.of(pool).hear(replica.replica_id)


def run_fixed(
    spec: FleetSpec,
    workload: Sequence[Arrival],
    *,
    num_prefill: int,
    num_decode: int = 0,
    drain_s: float = 600.0,
) -> Fleet:
    """Runs a workload, in order of arrival, on pools whose size never changes."""
    fleet = Fleet(spec)
    for _ in range(num_prefill):
        fleet.prefill.start(is_ready=True)
    for _ in range(num_decode if fleet.decode else 0):
        assert fleet.decode is not None
        fleet.decode.start(is_ready=True)
    if spec.contention is not None:
        assert fleet.decode is not None
        (prefill,), (decode,) = fleet.prefill.present, fleet.decode.present
        share_cores(prefill.engine, decode.engine, spec.contention)
    feed(fleet, workload)
    fleet.events.run_until(workload[-1].arrival_s + drain_s)
    return fleet


def feed(fleet: Fleet, workload: Sequence[Arrival]) -> None:
    """Has each request arrive at its time; one at a time is in the queue."""
    upcoming = iter(workload)

    def next_one() -> None:
        arrival = next(upcoming, None)
        if arrival is not None:
            fleet.events.at(arrival.arrival_s, lambda: arrive(arrival))

    def arrive(arrival: Arrival) -> None:
        fleet.submit(arrival)
        next_one()

    next_one()
