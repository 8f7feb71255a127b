"""The cluster's face towards vLLM's front end: an engine-core client over two pools.

vLLM's AsyncLLM adds requests here and reads token outputs here, as it would from one engine. Owns
every running request of this router: which replica has it, what comes next, and how it ends. A
request that was accepted always ends in a final output, an error output, or an abort: one that
loses its engine goes on in another, after the tokens that its client has. Whatever goes wrong with
one request ends that one and leaves nothing of it: every step of a request's way is taken in
`_isolated`.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Concatenate, ParamSpec

from vllm.v1.engine import (
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.engine.core_client import EngineCoreClient

from engine.output_tokens import OUTPUT_TOKENS
from engine.step_limit import STEP_LIMIT
from engine.wire import Rejection, StepOutputs
from router.admission import bad_request, rejected, too_many, unavailable
from router.answers import NOTE, Refusal, note_failure, note_route
from router.arrivals import Arrivals
from router.audit import RouterHoldings
from router.errors import CannotBeSent, NoReplica
from router.faults import FAILURES, HANGS, Fault
from router.handoff import Route, plan_handoff
from router.lanes import latest_start_ms
from router.metrics import COMPLETE, RouterMetrics
from router.pairs import Pairs
from router.phases import RequestPhase
from router.placement import Placement, Placer
from router.policies import Policy, RoutePlan
from router.pool import Pool, PoolEvents, Replica
from router.quarantine import Quarantine
from router.recovery import Failures, Hang, RecoveryLimits, one_more, plan_move
from router.request import (
    KV_PARAMS,
    RequestState,
    decode_request,
    prefill_request,
)
from router.second_look import MOST_LOOKS, looks_again, moves_on
from router.settings import Targets
from router.traffic import TrafficMeter
from router.transfers import Transfers

logger = logging.getLogger(__name__)

_P = ParamSpec("_P")

_HANGS_KEPT = 100
"""The last ones: what several have in common is seen of a few."""


class _Resources:
    """The part of an engine's resources that AsyncLLM asks about: replicas die, the cluster not."""

    engine_dead = False


class ClusterCoreClient(EngineCoreClient):  # type: ignore[misc]
    """Requests in, token outputs out, across the prefill and decode pools."""

    resources = _Resources()
    engine_ranks_managed = (0,)

    def __init__(
        self,
        policy: Policy,
        metrics: RouterMetrics,
        limits: RecoveryLimits,
        *,
        traffic: TrafficMeter,
        targets: Targets | None = None,
        num_routers: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock` says when replicas hang."""
        events = PoolEvents(
            opened=self._opened,
            stepped=self._stepped,
            taken=self._taken,
            rejected=self._rejected,
            gone=self._gone,
        )
        transfers = Transfers()
        self.prefill, self.decode = (
            Pool(name, policy, events, num_routers=num_routers, transfers=transfers)
            for name in ("prefill", "decode")
        )
        self.pairs = Pairs()
        self._looks_again = looks_again(policy, num_routers=num_routers)
        self._targets = targets or Targets()
        self._placer = Placer(
            self.prefill,
            self.decode,
            self._targets,
            pairs=self.pairs,
            num_routers=num_routers,
            expected_output_tokens=metrics.expected_output_tokens,
            handover_s=lambda: metrics.handover_s,
        )
        self.limits = limits
        self._metrics = metrics
        self._traffic = traffic
        self._requests: dict[str, RequestState] = {}
        self._in_engines: dict[str, RequestState] = {}
        """The same by what engines call them, which changes with every move."""
        self._arrivals = Arrivals(self._targets.queue_timeout_s, self._first_token_too_late)
        self._quarantine: Quarantine[RequestState] = Quarantine()
        self._clock = clock
        self._hangs: deque[Hang] = deque(maxlen=_HANGS_KEPT)
        self._outputs: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        self._read_s = 0.0
        """When outputs were last asked for, or put where there were none."""

    # What AsyncLLM calls.

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return ("generate",)

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Sends a request on its way."""
        try:
            # The choices of one HTTP request come one after the other: each lets others run.
            await asyncio.sleep(0)
            state = self._add(request)
            if state.replica is not None and state.replica.end is not None:
                # Where much is to be sent, the next one waits until it can be.
                await state.replica.end.drained()
        except BaseException:
            # The front end has it already, and forgets what it added only with a last output.
            self._deliver([_last(request.request_id, FinishReason.ABORT)])
            self.cancel([request.request_id])
            raise

    def _add(self, request: EngineCoreRequest) -> RequestState:
        params = request.sampling_params
        assert params is not None, "only generation is served"
        for ours in (KV_PARAMS, OUTPUT_TOKENS, STEP_LIMIT):
            # Where KV and tokens come from, and in which pieces, no client decides.
            (params.extra_args or {}).pop(ours, None)
        request.data_parallel_rank = None
        state = RequestState(request=request, note=NOTE.get(), num_ahead=len(self._arrivals))
        self._requests[request.request_id] = state
        self._arrivals.add(state)
        self._deliver(self._isolated(self._route, state))
        return state

    async def get_output_async(self) -> EngineCoreOutputs:
        self._read_s = time.monotonic()
        return await self._outputs.get()

    def unread_s(self) -> float:
        """For how long outputs have waited for the front end to ask for them."""
        return 0.0 if self._outputs.empty() else time.monotonic() - self._read_s

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Ends requests whose answers are complete: a stop string has come, says the front end."""
        self._stop_all(request_ids, str(FinishReason.STOP))

    def cancel(self, request_ids: Iterable[str]) -> None:
        """Ends requests whose answers nobody waits for any more."""
        self._stop_all(request_ids, str(FinishReason.ABORT))

    def _stop_all(self, request_ids: Iterable[str], outcome: str) -> None:
        for request_id in request_ids:
            if (state := self._requests.get(request_id)) is not None:
                # A decode engine that is told so frees what prefill keeps for it, in any state.
                self._isolated(self._stop, state, outcome)

    def _stop(self, state: RequestState, outcome: str) -> list[EngineCoreOutput]:
        self._withdraw(state)
        self._end(state, outcome)
        return []

    def get_kv_event_sources(self) -> dict[int, object]:
        return {}

    def dp_engines_running(self) -> bool:
        return bool(self._requests)

    def shutdown(self, timeout: float | None = None) -> None:
        for pool in (self.prefill, self.decode):
            for replica in list(pool):
                if replica.end is not None:
                    replica.end.close("the router was stopped")

    def scaling_report(self) -> dict[str, float]:
        """What this router counts and what is outstanding: see router.traffic."""
        return self._traffic.report(
            prefill=self.prefill, decode=self.decode, requests=self._requests.values()
        )

    def holdings(self, front_end: frozenset[str]) -> RouterHoldings:
        """What this router has, with what vLLM's front end waits for; for an audit."""
        placed: dict[str, set[str]] = {}
        for state in self._requests.values():
            if state.replica is not None:
                placed.setdefault(state.replica.replica_id, set()).add(state.engine_request_id)
        replicas = [*self.prefill, *self.decode]
        return RouterHoldings(
            front_end=front_end,
            requests=frozenset(self._requests),
            placed={replica_id: frozenset(ids) for replica_id, ids in placed.items()},
            ledger={each.replica_id: each.pool.ledger.sent(each.replica_id) for each in replicas},
            reading={each.replica_id: frozenset(each.reading) for each in replicas},
            arrivals=frozenset(self._arrivals),
            suspects=frozenset(state.request_id for state in self._quarantine.all),
            num_inflight=self._metrics.num_inflight(),
        )

    # The way of a request. Each step of it returns what the client is to be given.

    def _isolated(
        self,
        step: Callable[Concatenate[RequestState, _P], list[EngineCoreOutput]],
        state: RequestState,
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> list[EngineCoreOutput]:
        """Takes one step of a request's way; what goes wrong ends the request and nothing else."""
        try:
            return step(state, *args, **kwargs)
        except CannotBeSent as error:
            return self._refused(state, "cannot_be_sent", bad_request(str(error)))
        except Exception as error:
            logger.exception("request %s", state.request_id)
            return self._failed(state, f"{type(error).__name__}: {error}")

    def _route(self, state: RequestState) -> list[EngineCoreOutput]:
        """Sends a request, or what is left of it, to its next engine."""
        state.plan = plan_handoff(
            state.params,
            num_output_tokens=state.num_output_tokens,
            has_prefill=self._placer.has_prefill,
            num_tokens=state.num_tokens,
            num_dropped_tokens=self.prefill.num_dropped_tokens,
        )
        state.prefill = state.decode = None
        needs_decode = state.plan.route is not Route.PREFILL_ONLY or state.is_suspect
        if needs_decode and not self.decode.is_open:
            admission = self._placer.admission(state, None)
            if state.attempt == 0 and not admission.admits:
                return self._refused(state, admission.reason, too_many(admission))
            return self._wait(state)
        if state.is_suspect:
            self._wait(state)
            self._quarantine.wait(state)
            return self._send_suspects()
        placement = self._placer.place(state, state.plan)
        if state.attempt == 0:
            admission = self._placer.admission(state, placement)
            if not admission.admits:
                return self._refused(state, admission.reason, too_many(admission))
        return self._send(state, placement)

    def _send_suspects(self) -> list[EngineCoreOutput]:
        """Sends those suspects for which there is a replica without one."""
        outputs: list[EngineCoreOutput] = []
        while (state := self._quarantine.next) is not None:
            placement = self._placer.place_apart(state, self._quarantine.occupied)
            if placement is None:
                break
            self._quarantine.enter(state, placement.reader.replica_id)
            outputs += self._isolated(self._send, state, placement)
        return outputs

    def _send(self, state: RequestState, placement: Placement) -> list[EngineCoreOutput]:
        """Sends a request where it is to go."""
        state.plan = placement.plan
        self._metrics.routed(state, placement.reader, prefill_s=placement.prefill_s)
        note_route(state.note, f"{state.plan.route.name.lower()};reason={state.plan.reason}")
        self._in_engines.pop(state.engine_request_id, None)
        state.attempt += 1
        self._in_engines[state.engine_request_id] = state
        state.num_predicted_cached = placement.reader.num_cached_tokens
        if state.plan.route is Route.DECODE_ONLY:
            replica = self.decode[placement.reader.replica_id]
            work_s = self._placer.local_share_s(state, placement)
            request = decode_request(state, None, step_limit_s=placement.step_limit_s)
            self._to_decode(state, replica, request, work_s)
            replica.reading[state.engine_request_id] = placement.reader.request_s
        else:
            self._to_prefill(state, placement.reader)
        return []

    def _to_prefill(self, state: RequestState, reader: RoutePlan) -> None:
        route = state.plan.route
        samples = route is not Route.DECODE_FIRST
        hands_over = route is not Route.PREFILL_ONLY
        request = prefill_request(state, samples=samples, hands_over=hands_over)
        request.priority = latest_start_ms(
            arrival_s=request.arrival_time,
            prefill_s=reader.request_s,
            ttft_s=self._targets.admission.ttft_s,
            client_priority=request.priority,
        )
        # From receipt on: the time of day, of which the other two are, may be set meanwhile.
        latest_start_s = state.received_s + request.priority / 1000 - request.arrival_time
        replica = self.prefill[reader.replica_id]
        asks_load = self._looks_again and state.num_looks < MOST_LOOKS
        replica.add(
            request,
            reader.request_s,
            deadline_s=latest_start_s + reader.request_s,
            asks_load=asks_load,
        )
        state.prefill = replica
        if state.phase is not RequestPhase.PREFILLING:
            self._enter(state, RequestPhase.PREFILLING)
        if not asks_load:
            self.prefill.prefixes.add(reader.replica_id, state.chain)

    def _hand_over(
        self, state: RequestState, kv_transfer_params: dict[str, Any] | None
    ) -> list[EngineCoreOutput]:
        assert state.prefill is not None
        work_s = self._placer.decode_share_s(state)
        replica_id = self._placer.decode_replica(state, state.prefill, work_s)
        if replica_id is None:
            # Nobody who is left can read it there: as if the KV were lost.
            self._release_handover(state)
            return self._route(state)
        request = decode_request(state, kv_transfer_params)
        self._to_decode(state, self.decode[replica_id], request, work_s)
        return []

    def _to_decode(
        self, state: RequestState, replica: Replica, request: EngineCoreRequest, work_s: float
    ) -> None:
        replica.add(request, work_s, is_suspect=state.is_suspect)
        state.decode = replica
        self._enter(state, RequestPhase.TRANSFERRING if state.prefill else RequestPhase.DECODING)

    def _wait(self, state: RequestState) -> list[EngineCoreOutput]:
        """Holds a request until a decode replica may have it, or its time is up."""
        if state.waits_until is None:
            self._enter(state, RequestPhase.WAITING)
            loop = asyncio.get_running_loop()
            wait_s = self.limits.max_wait_s
            state.waits_until = loop.call_later(wait_s, self._waited_too_long, state)
        return []

    def _waited_too_long(self, state: RequestState) -> None:
        reason = f"no decode replica for {self.limits.max_wait_s:g} s"
        self._deliver(self._refused(state, "no_decode_replica", unavailable(reason)))

    def _first_token_too_late(self, state: RequestState) -> None:
        reason = f"no token within {self._targets.queue_timeout_s:g} s"
        self._deliver(self._refused(state, "queue_timeout", unavailable(reason)))

    def _refused(
        self, state: RequestState, reason: str, refusal: Refusal
    ) -> list[EngineCoreOutput]:
        """Ends a request with a status, if its client has been sent none; else with an error."""
        self._metrics.refused(reason)
        if state.note is not None:
            state.note.refusal = refusal
        logger.info("request %s refused: %s", state.request_id, refusal.message)
        return self._broken_off(state, "refused")

    def _failed(self, state: RequestState, reason: str) -> list[EngineCoreOutput]:
        logger.warning("request %s failed: %s", state.request_id, reason)
        note_failure(state.note)
        return self._broken_off(state, "error")

    def _broken_off(self, state: RequestState, outcome: str) -> list[EngineCoreOutput]:
        self._withdraw(state)
        self._end(state, outcome)
        return [_last(state.request_id, FinishReason.ERROR)]

    def _withdraw(self, state: RequestState) -> None:
        """Takes a request from the engines. Decode tells prefill that its blocks are not needed;
        where decode does not have it, this does."""
        if state.replica is not None and state.replica.has(state.engine_request_id):
            state.replica.abort(state.engine_request_id)
        elif state.phase in (RequestPhase.PREFILLING, RequestPhase.TRANSFERRING):
            self._release_handover(state)

    def _enter(self, state: RequestState, phase: RequestPhase) -> None:
        self._metrics.phase_entered(state, phase)
        state.phase = phase
        state.phase_since_s = time.monotonic()
        if state.waits_until is not None:
            state.waits_until.cancel()
            state.waits_until = None

    def _end(self, state: RequestState, outcome: str) -> None:
        if self._requests.pop(state.request_id, None) is None:
            return
        self._in_engines.pop(state.engine_request_id, None)
        self._arrivals.discard(state)
        self._enter(state, RequestPhase.ENDED)
        self._metrics.ended(state, outcome)
        if self._quarantine.leave(state):
            self._deliver(self._send_suspects())
        if outcome in COMPLETE and state.decode is not None:
            # The next turn of a conversation begins with this one.
            chain = state.blocks(self.decode.block_size)
            self.decode.prefixes.add(state.decode.replica_id, chain)

    def _move(
        self, state: RequestState, cause: str, failures: Failures | None, *, is_blameless: bool
    ) -> list[EngineCoreOutput]:
        """Takes a request from an engine that does not have it any more, and starts it again."""
        state.failures = failures
        plan = plan_move(
            num_moves=state.num_moves + state.num_blameless_moves,
            failures=failures,
            num_alone=state.num_alone_failures,
            num_hangs=state.num_hangs,
            limits=self.limits,
        )
        if not plan.moves:
            return self._failed(state, f"{cause}; {plan.reason}")
        self._metrics.moved(state, cause)
        logger.info("request %s moves: %s", state.request_id, cause)
        if is_blameless:
            state.num_blameless_moves += 1
        else:
            state.num_moves += 1
        return self._route(state)

    # What the replicas say.

    def _taken(self, replica: Replica, engine_request_id: str) -> None:
        """A prefill replica has a prompt, and has just said what is ahead of it: look again."""
        state = self._in_engines.get(engine_request_id)
        if state is not None and state.replica is replica:
            self._deliver(self._isolated(self._look_again, state, replica))

    def _look_again(self, state: RequestState, replica: Replica) -> list[EngineCoreOutput]:
        state.num_looks += 1
        better = self._better(state, replica)
        if better is None:
            self.prefill.prefixes.add(replica.replica_id, state.chain)
            return []
        self._metrics.called_back()
        self._withdraw(state)
        state.prefill = None
        return self._send(state, better)

    def _better(self, state: RequestState, replica: Replica) -> Placement | None:
        """A way that is worth leaving a prefill replica for, which has not begun yet."""
        try:
            placement = self._placer.place(state, state.plan)
        except NoReplica:
            return None
        is_better = moves_on(
            here_s=replica.work_s,
            there_s=placement.ttft_s,
            request_s=placement.reader.request_s,
        )
        return placement if is_better else None

    def _opened(self, replica: Replica) -> None:
        if replica.pool is not self.decode:
            return
        for state in list(self._requests.values()):
            # Those before it may have sent it on, or ended it.
            if state.waits_until is not None:
                self._deliver(self._isolated(self._route, state))
        self._deliver(self._send_suspects())

    def _stepped(self, replica: Replica, step: StepOutputs) -> None:
        outputs: list[EngineCoreOutput] = []
        for output in step.outputs:
            state = self._in_engines.get(output.request_id)
            if output.new_token_ids:
                replica.reading.pop(output.request_id, None)
            if output.finished:
                replica.settle(output.request_id)
            if state is not None and state.replica is replica:
                outputs += self._isolated(self._computed, state, replica, output)
            elif output.kv_transfer_params is not None:
                # Aborted while this was under way; what was handed over is nobody's now.
                replica.release(output.request_id)
        if self._quarantine.next is not None:
            # The replica may have said that another router's suspect has left it.
            outputs += self._send_suspects()
        self._deliver(outputs)

    def _computed(
        self, state: RequestState, replica: Replica, output: EngineCoreOutput
    ) -> list[EngineCoreOutput]:
        if output.finish_reason == FinishReason.ABORT:
            # Not by us, so the engine is being stopped.
            cause = f"{replica.pool.name}_stopped"
            return self._move(state, cause, state.failures, is_blameless=True)
        if state.phase is RequestPhase.PREFILLING:
            return self._prefilled(state, output)
        return [self._decoded(state, output)]

    def _prefilled(self, state: RequestState, output: EngineCoreOutput) -> list[EngineCoreOutput]:
        """Prefill is done: the request ends here or goes on to decode."""
        self._metrics.queued(state, output)
        state.prefill_stats = output.prefill_stats
        self._learn_cached(state, self.prefill, output)
        if state.plan.route is Route.PREFILL_ONLY or output.finish_reason != FinishReason.LENGTH:
            return [self._forward(state, output)]
        forwarded = []
        if state.plan.route is Route.PREFILL_FIRST:
            first = output.__copy__()
            first.finish_reason = None
            forwarded.append(self._forward(state, first))
        return [*forwarded, *self._hand_over(state, output.kv_transfer_params)]

    def _learn_cached(self, state: RequestState, pool: Pool, output: EngineCoreOutput) -> None:
        """Compares what an engine found cached of a prompt with what it was thought to have."""
        if state.num_predicted_cached and output.prefill_stats is not None:
            num_cached = output.prefill_stats.num_cached_tokens
            pool.prefixes.observe(num_predicted=state.num_predicted_cached, num_cached=num_cached)
            state.num_predicted_cached = 0

    def _decoded(self, state: RequestState, output: EngineCoreOutput) -> EngineCoreOutput:
        if state.phase is RequestPhase.TRANSFERRING:
            self._metrics.queued(state, output)
            self._enter(state, RequestPhase.DECODING)
        if state.plan.route is Route.DECODE_ONLY:
            self._learn_cached(state, self.decode, output)
        if state.prefill is not None:
            # Decode's own count would call the whole prompt cached.
            is_first = state.num_output_tokens == 0
            output.prefill_stats = state.prefill_stats if is_first else None
        return self._forward(state, output)

    def _clear(self, state: RequestState) -> None:
        """A request has shown that it is not what made engines fail."""
        state.failures = None
        if self._quarantine.leave(state):
            if state.replica is not None:
                state.replica.clear(state.engine_request_id)
            self._deliver(self._send_suspects())

    def _forward(self, state: RequestState, output: EngineCoreOutput) -> EngineCoreOutput:
        """The output as the client's front end gets it; ends the request if it is the last."""
        output.request_id = state.request_id
        output.kv_transfer_params = None
        if output.new_token_ids:
            state.num_blameless_moves = 0
            if not state.num_output_tokens:
                self._arrivals.discard(state)
        self._metrics.tokens_out(state, output.new_token_ids)
        if state.failures is not None and state.failures.clears(state.num_output_tokens):
            self._clear(state)
        if output.finish_reason == FinishReason.ERROR:
            note_failure(state.note)
        if output.finished:
            self._end(state, str(output.finish_reason))
        return output

    def _release_handover(self, state: RequestState) -> None:
        """Frees what prefill keeps for a decode that will not come. Harmless once it was pulled."""
        if state.prefill is not None:
            state.prefill.release(state.engine_request_id)

    def _rejected(self, replica: Replica, rejection: Rejection) -> None:
        state = self._in_engines.get(rejection.request_id)
        if state is not None and state.replica is replica:
            self._deliver(self._isolated(self._sent_back, state, rejection))

    def _sent_back(self, state: RequestState, rejection: Rejection) -> list[EngineCoreOutput]:
        if rejection.has_suspect:
            return self._route(state)
        return self._refused(state, "rejected", rejected(rejection.reason))

    def _gone(self, replica: Replica, reason: str) -> None:
        """A replica's connection has ended: what it had goes on elsewhere."""
        outputs: list[EngineCoreOutput] = []
        had = [state for state in self._requests.values() if state.replica is replica]
        hang = None
        if replica.fault in HANGS:
            hang = Hang(replica_id=replica.replica_id, at_s=self._clock())
            self._hangs.append(hang)
        if len(had) == 1 and replica.exit is not None and replica.exit.num_requests == 1:
            had[0].num_alone_failures += 1
        for state in list(self._requests.values()):
            if state.replica is replica or (
                state.prefill is replica and state.phase is RequestPhase.TRANSFERRING
            ):
                outputs += self._isolated(self._fail_over, state, replica, hang)
        self._deliver(outputs)

    def _fail_over(
        self, state: RequestState, lost: Replica, hang: Hang | None
    ) -> list[EngineCoreOutput]:
        how = lost.fault.value if lost.fault is not None else lost.load.leaves_because or "left"
        failures = state.failures
        # Where its blocks went with prefill, a decode that has pulled them loses little.
        self._withdraw(state)
        if state.replica is lost:
            state.num_hangs += hang is not None
        if lost.fault in FAILURES and state.replica is lost:
            failures = one_more(
                failures,
                num_tokens=state.num_output_tokens,
                was_prefilling=state.phase is RequestPhase.PREFILLING,
                hang=hang,
                all_hangs=self._hangs,
                stall_timeout_s=self.limits.stall_timeout_s,
            )
        is_blameless = lost.fault is not Fault.ENGINE_ENDED
        cause = f"{lost.pool.name}_{how}"
        return self._move(state, cause, failures, is_blameless=is_blameless)

    def _deliver(self, outputs: Iterable[EngineCoreOutput]) -> None:
        batch = list(outputs)
        if batch:
            if self._outputs.empty():
                self._read_s = time.monotonic()
            self._outputs.put_nowait(
                EngineCoreOutputs(
                    outputs=batch,
                    timestamp=time.monotonic(),
                    # Of engines whose weights were never changed, as with one plain server.
                    weight_version="default",
                )
            )


def _last(request_id: str, reason: FinishReason) -> EngineCoreOutput:
    return EngineCoreOutput(request_id, [], finish_reason=reason)
