"""The simulated cluster: requests go through routers, a prefill pool and a decode pool.

Owns the pools, the routers, and the requests between engines. Decides nothing: routing is
`router.policies`, the pools' sizes are set from outside. With `decode` None, one pool of engines
does both phases, as a plain vLLM server would.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks.simulate.agenda import Agenda
from benchmarks.simulate.engine import Engine
from benchmarks.simulate.history import History, Observation
from benchmarks.simulate.pools import ReplicaState, SimPool, SimReplica
from benchmarks.simulate.profiles import EngineProfile
from benchmarks.simulate.requests import Arrival, SimRequest
from benchmarks.simulate.routing import SimRouter, report_load
from benchmarks.simulate.shared_cores import Contention, share_cores
from router.deadline_order import latest_start_ms
from router.local_prefill import DecodeCandidate, LocalPlan, plan_local_prefill
from router.phases import RequestPhase
from router.policies import ReplicaPlan
from router.reroute import MAX_ACKNOWLEDGEMENTS, is_rerouted
from router.transfer_fit import Reads
from router.transfers import TransferEstimate

EXPECTED_OUTPUT_TOKENS = 128.0
"""Of an answer, over which a router spreads a prompt that decode reads."""


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


class Fleet:
    """One run. An `EngineListener` and a `PoolWatcher`."""

    def __init__(self, spec: FleetSpec, agenda: Agenda | None = None) -> None:
        self.spec = spec
        self.agenda = agenda or Agenda()
        self.history = History()
        self.requests: list[SimRequest] = []
        self.prefill = SimPool("prefill", self.agenda, spec.prefill, self, self)
        self.decode = (
            SimPool("decode", self.agenda, spec.decode, self, self) if spec.decode else None
        )
        self.num_decoding = 0
        self.num_read_in_decode = 0
        self.num_near = 0
        """Handovers within a node."""
        self.routers = [
            SimRouter(each, spec.num_routers, spec.policy, spec.seed)
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
        replicas = self.prefill.present
        sent_s = sum(
            router.sent_s.get(each.replica_id, 0.0) for router in self.routers for each in replicas
        )
        return sent_s + sum(self._prefill_s(each) for each in self._held["prefill"])

    def submit(self, arrival: Arrival) -> None:
        """A request arrives now."""
        request = SimRequest(arrival, len(self.requests))
        request.router_id = request.request_id % self.spec.num_routers
        self.requests.append(request)
        self.history.arrived(arrival)
        self.agenda.after(self.spec.edge_s, lambda: self._route(request))

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
            now_s=self.agenda.now_s,
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
        router, now_s = self.routers[request.router_id], self.agenda.now_s
        work_s = self._prefill_s(request)
        plan = self._rerouted(router, router.plan(self.prefill, work_s, now_s), work_s)
        local = self._read_in_decode(request, plan.finish_s)
        if not request.num_moves:
            asks_prefill = local is None or local.relieves_prefill
            self.history.prefill_s.add(now_s, work_s if asks_prefill else 0.0)
        if local is not None:
            return
        request.latest_start_ms = request.step_limit_s = due_s = None
        if self.spec.ttft_s is not None:
            request.latest_start_ms = latest_start_ms(
                arrival_s=request.arrival.arrival_s, prefill_s=work_s, ttft_s=self.spec.ttft_s
            )
            due_s = request.latest_start_ms / 1000 + work_s
        replica = router.enter(self.prefill, plan, request, work_s, now_s, deadline_s=due_s)
        self.send_to_prefill(request, replica)

    def _rerouted(self, router: SimRouter, plan: ReplicaPlan, work_s: float) -> ReplicaPlan:
        """Where a prompt goes once replicas have said what they have, as in production but for the
        round trip that each answer takes."""
        now_s, ledger = self.agenda.now_s, router.ledgers[self.prefill.name]
        for _ in range(MAX_ACKNOWLEDGEMENTS if router.asks_acknowledgements else 0):
            replica = self.prefill.by_id[plan.replica_id]
            report_load(self.routers, router, self.prefill, replica, now_s)
            here_s = ledger.work_s(plan.replica_id) + work_s
            better = router.plan(self.prefill, work_s, now_s)
            if not is_rerouted(here_s=here_s, there_s=better.finish_s, request_s=work_s):
                break
            plan = better
        return plan

    def _read_in_decode(self, request: SimRequest, prefill_s: float) -> LocalPlan | None:
        """Has decode read the prompt where that is better, as production's routers do."""
        decode, ttft_s, itl_s = self.decode, self.spec.ttft_s, self.spec.itl_s
        if ttft_s is None or itl_s is None or decode is None or not decode.ready:
            return None
        router, now_s = self.routers[request.router_id], self.agenda.now_s
        cost = decode.profile.prefill
        request_s = cost.seconds(num_uncached=request.num_tokens, num_tokens=request.num_tokens)
        plan = router.plan(decode, request_s, now_s)
        reading_s = router.reading_s.setdefault(plan.replica_id, {})
        engine = decode.by_id[plan.replica_id].engine
        local = plan_local_prefill(
            DecodeCandidate(
                base_s=decode.profile.overhead_s + decode.profile.decode[0].cost.base_s,
                answers_s=plan.wait_s,
                prefilling_s=sum(reading_s.values()),
                request_s=request_s,
                kv_usage_fraction=engine.kv_usage_fraction,
                has_room=not engine.waiting,
                is_cached=False,
            ),
            prefill_s=prefill_s,
            transfer_s=self.spec.handover_s + decode.profile.transfer_s(request.num_tokens),
            ttft_s=ttft_s,
            itl_s=itl_s,
        )
        if local is None:
            return None
        reading_s[request.request_id] = request_s
        request.phase = RequestPhase.DECODING
        request.step_limit_s, request.latest_start_ms = local.step_limit_s, None
        request.hands_over = False
        self.num_decoding += 1
        self.num_read_in_decode += 1
        share_s = self._share_s(request) + request_s / EXPECTED_OUTPUT_TOKENS
        replica = router.enter(decode, plan, request, share_s, now_s)
        replica.engine.submit(request)
        return local

    def send_to_prefill(self, request: SimRequest, replica: SimReplica) -> None:
        """The request's prompt is to be read there."""
        request.phase = RequestPhase.PREFILLING
        request.hands_over = self.decode is not None
        self._prefilled_by[request.request_id] = replica
        replica.engine.submit(request)

    def prefilled(self, engine: Engine, request: SimRequest) -> None:
        """EngineListener: the first token is out, or the first after a move or preemption."""
        replica = self._prefilled_by.get(request.request_id)
        if request.num_generated == 1:
            self.history.first_token(request)
        if replica is not None and replica.engine is engine:
            router = self.routers[request.router_id]
            if self.decode is not None or not request.num_left:
                router.complete(self.prefill, replica, request)
            if self.spec.reports_with_outputs:
                report_load(self.routers, router, self.prefill, replica, self.agenda.now_s)
            if not request.num_left:
                del self._prefilled_by[request.request_id]
                self._end(request, self.prefill, replica)
            elif self.decode is not None:
                self.agenda.after(self.spec.handover_s, lambda: self._to_decode(request))
            else:
                request.phase = RequestPhase.DECODING
                self.num_decoding += 1
        else:  # read by decode, or computed anew where it had been preempted
            assert self.decode is not None
            reader = self.decode.by_engine[id(engine)].replica_id
            self.routers[request.router_id].reading_s.get(reader, {}).pop(request.request_id, None)
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
        request.latest_start_ms = None  # decode takes requests as they come
        self.num_decoding += 1
        router = self.routers[request.router_id]
        replica = router.pick(
            self.decode,
            request,
            self._share_s(request),
            self.agenda.now_s,
            transfer=self._transfer(request),
        )
        self._set_out(request, replica)
        replica.engine.submit(request)

    def _transfer(self, request: SimRequest) -> TransferEstimate | None:
        source, nodes = self._prefilled_by.get(request.request_id), self.spec.nodes
        if source is None or nodes is None or not nodes.seen:
            return None
        return self.routers[request.router_id].transfers.estimate(
            source.replica_id,
            num_bytes=request.num_tokens * self.spec.prefill.kv_bytes_per_token,
            num_steps=EXPECTED_OUTPUT_TOKENS,
            now_s=self.agenda.now_s,
        )

    def _set_out(self, request: SimRequest, reader: SimReplica) -> None:
        """Its KV takes the way between these replicas; routers will know what that took."""
        source, nodes = self._prefilled_by.get(request.request_id), self.spec.nodes
        if source is None or nodes is None:
            return
        is_near = nodes.of(source) == nodes.of(reader)
        request.link_bytes_per_s = None if is_near else nodes.bytes_per_s
        self.num_near += is_near
        profile = reader.engine.profile
        num_bytes = request.num_computed * profile.kv_bytes_per_token
        rate = request.link_bytes_per_s or profile.link_bytes_per_s
        reads = Reads(num=1, num_bytes=num_bytes, seconds=profile.link_latency_s + num_bytes / rate)
        for router in self.routers:
            router.transfers.observe(
                reads,
                prefill=source.replica_id,
                decode=reader.replica_id,
                now_s=self.agenda.now_s,
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
        self.routers[request.router_id].complete(pool, replica, request)
        self._end(request, pool, replica)

    def _end(self, request: SimRequest, pool: SimPool, replica: SimReplica) -> None:
        request.phase = RequestPhase.ENDED
        self._num_ended += 1
        self.history.ended(request)
        pool.drained(replica)

    def _release_source(self, request: SimRequest) -> None:
        source = self._prefilled_by.pop(request.request_id, None)
        if source is not None and source.engine.is_alive:
            source.engine.release(request.num_computed)
            self.prefill.drained(source)

    def _share_s(self, request: SimRequest) -> float:
        """What it adds to each decode step."""
        assert self.decode is not None
        cost = self.decode.profile.decode[0].cost
        return cost.share_s(num_context_tokens=request.num_tokens)

    def _prefill_s(self, request: SimRequest) -> float:
        num_tokens = request.num_tokens
        return self.spec.prefill.prefill.seconds(
            num_uncached=num_tokens - request.num_cached, num_tokens=num_tokens
        )

    # What replicas and routers tell each other.

    def _pool_of(self, replica: SimReplica) -> SimPool:
        return next(pool for pool in self.pools if pool.by_id.get(replica.replica_id) is replica)

    def joined(self, pool: SimPool, replica: SimReplica) -> None:
        """PoolWatcher: requests that waited for a replica go to it."""
        nodes = self.spec.nodes
        for router in self.routers:
            router.ledgers[pool.name].insert(replica.replica_id, self.agenda.now_s)
            router.transfers.insert(replica.replica_id, nodes.of(replica) if nodes else None)
        self._report(pool, replica)
        held = self._held[pool.name]
        submit = self._route if pool is self.prefill else self._to_decode
        while held:
            submit(held.popleft())

    def closed(self, pool: SimPool, replica: SimReplica) -> None:
        """PoolWatcher."""
        for router in self.routers:
            router.ledgers[pool.name].close(replica.replica_id)

    def gone(self, pool: SimPool, replica: SimReplica) -> None:
        """PoolWatcher."""
        for router in self.routers:
            router.forget(pool, replica)

    def _report(self, pool: SimPool, replica: SimReplica) -> None:
        """Reports to all routers, now and every period; each router at its own time."""
        if replica.state is not ReplicaState.READY:
            return
        period_s = self.spec.report_period_s
        for router in self.routers:
            offset_s = period_s * (router.router_id + 1) / len(self.routers)
            self.agenda.after(offset_s, partial(self._report_to, router, pool, replica))
        self.agenda.after(period_s, lambda: self._report(pool, replica))

    def _report_to(self, router: SimRouter, pool: SimPool, replica: SimReplica) -> None:
        if replica.state is ReplicaState.READY:
            report_load(self.routers, router, pool, replica, self.agenda.now_s)


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
    fleet.agenda.run_until(workload[-1].arrival_s + drain_s)
    return fleet


def feed(fleet: Fleet, workload: Sequence[Arrival]) -> None:
    """Has each request arrive at its time; one at a time is on the agenda."""
    upcoming = iter(workload)

    def next_one() -> None:
        arrival = next(upcoming, None)
        if arrival is not None:
            fleet.agenda.at(arrival.arrival_s, lambda: arrive(arrival))

    def arrive(arrival: Arrival) -> None:
        fleet.submit(arrival)
        next_one()

    next_one()
