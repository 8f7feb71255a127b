"""The life of a request: registered, routed, sent, prefilled, transferred, decoded, ended.

Owns which requests this router has, and the one place that isolates them: whatever goes wrong with
one ends that one and leaves nothing of it (`RequestLifecycle.isolated`). A request that was taken
ends in a final output, an error output, or an abort. What becomes of those whose engine does not
finish them is the business of `router.failover`, which subscribes.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Concatenate, ParamSpec

from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

from engine.wire import StepOutputs
from router.dispatcher import Dispatcher
from router.errors import CannotBeSent
from router.metrics import RouterMetrics
from router.output_queue import OutputQueue
from router.pending_first_tokens import PendingFirstTokens
from router.phases import COMPLETE, RequestPhase
from router.placement import Placement, Placer
from router.pool import Pool, PoolEvents, Replica
from router.prediction import Predictor
from router.refusals import Refusal, bad_request, too_many, unavailable
from router.request import RequestState
from router.route_note import RouteNote, note_failure
from router.routes import Route, plan_route
from router.traffic import TrafficMeter

logger = logging.getLogger(__name__)

_P = ParamSpec("_P")

Outputs = list[EngineCoreOutput]
"""What clients are to be given. Each step of a request's way returns them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEvents:
    """What a subscriber does with what it is told of requests."""

    stopped: Callable[[RequestState, Replica], None]
    """Its engine gives it back unfinished."""
    progressed: Callable[[RequestState], None]
    """An engine has gone on with one that other engines have failed with."""
    ended: Callable[[RequestState], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Waits:
    """How long a request may wait."""

    replica_s: float
    """For a decode replica, where none is there."""
    first_token_s: float | None
    """None for ever."""


class RequestLifecycle:
    """One router's requests, from receipt to end."""

    def __init__(
        self,
        prefill: Pool,
        decode: Pool,
        *,
        placer: Placer,
        dispatcher: Dispatcher,
        waits: Waits,
        outputs: OutputQueue,
        metrics: RouterMetrics,
        traffic: TrafficMeter,
        predictor: Predictor,
    ) -> None:
        self._prefill = prefill
        self._decode = decode
        self._placer = placer
        self._dispatcher = dispatcher
        self._waits = waits
        self._outputs = outputs
        self._metrics = metrics
        self._traffic = traffic
        self._predictor = predictor
        self._requests: dict[str, RequestState] = {}
        self._pending = PendingFirstTokens(waits.first_token_s, self._first_token_too_late)
        self._subscribers: list[RequestEvents] = []
        for pool in (prefill, decode):
            pool.subscribe(PoolEvents(stepped=self._stepped))

    def subscribe(self, events: RequestEvents) -> None:
        """Has somebody told what becomes of requests."""
        self._subscribers.append(events)

    @property
    def requests(self) -> Mapping[str, RequestState]:
        """Those that have not ended, by id."""
        return self._requests

    @property
    def pending_first_tokens(self) -> frozenset[str]:
        """Ids of those that are counted as having no token."""
        return frozenset(self._pending)

    # Receipt and end.

    def add(self, request: EngineCoreRequest, note: RouteNote | None) -> RequestState:
        """Registers a request and sends it on its way; `note` is of its HTTP request."""
        state = RequestState(request=request, note=note, num_ahead=len(self._pending))
        self._requests[request.request_id] = state
        self._pending.add(state)
        self.deliver(self.isolated(self.route, state))
        return state

    def stop(self, request_ids: Iterable[str], reason: FinishReason) -> None:
        """Ends requests whose clients need no more of them."""
        for request_id in request_ids:
            if (state := self._requests.get(request_id)) is not None:
                # A decode engine that is told so frees what prefill keeps for it, in any state.
                self.isolated(self._stop, state, str(reason))

    def _stop(self, state: RequestState, outcome: str) -> Outputs:
        self._dispatcher.withdraw(state)
        self._end(state, outcome)
        return []

    def _end(self, state: RequestState, outcome: str) -> None:
        if self._requests.pop(state.request_id, None) is None:
            return
        self._dispatcher.forget(state)
        self._pending.discard(state)
        self._metrics.phase_changed(state.enter(RequestPhase.ENDED, time.monotonic()))
        self._metrics.ended(outcome)
        if outcome in COMPLETE:
            self._learn(state)
        for each in self._subscribers:
            each.ended(state)
        if outcome in COMPLETE and state.decode is not None:
            # The next turn of a conversation begins with this one.
            chain = state.blocks(self._decode.block_size)
            self._decode.prefixes.add(state.decode.replica_id, chain)

    def _learn(self, state: RequestState) -> None:
        """A response is complete."""
        self._predictor.observe_response(state.num_output_tokens)
        if state.writing_s is not None:
            self._traffic.ended(state.decode, state.num_output_tokens, state.writing_s)

    def refuse(self, state: RequestState, reason: str, refusal: Refusal) -> Outputs:
        """Ends a request with a status, if its client has been sent none; else with an error."""
        self._metrics.refused(reason)
        if state.note is not None:
            state.note.refusal = refusal
        logger.info("request %s refused: %s", state.request_id, refusal.message)
        return self._break_off(state, "refused")

    def fail(self, state: RequestState, reason: str) -> Outputs:
        """Ends a request with an error."""
        logger.warning("request %s failed: %s", state.request_id, reason)
        note_failure(state.note)
        return self._break_off(state, "error")

    def _break_off(self, state: RequestState, outcome: str) -> Outputs:
        self._dispatcher.withdraw(state)
        self._end(state, outcome)
        return [last_output(state.request_id, FinishReason.ERROR)]

    def isolated(
        self,
        step: Callable[Concatenate[RequestState, _P], Outputs],
        state: RequestState,
        *args: _P.args,
        **kwargs: _P.kwargs,
    ) -> Outputs:
        """Takes one step of a request's way; what goes wrong ends the request and nothing else."""
        try:
            return step(state, *args, **kwargs)
        except CannotBeSent as error:
            return self.refuse(state, "cannot_be_sent", bad_request(str(error)))
        except Exception as error:
            logger.exception("request %s", state.request_id)
            return self.fail(state, f"{type(error).__name__}: {error}")

    def deliver(self, outputs: Iterable[EngineCoreOutput]) -> None:
        """Gives clients what is for them."""
        self._outputs.put(outputs)

    # Into an engine.

    def route(self, state: RequestState) -> Outputs:
        """Sends a request, or what is left of it, to its next engine."""
        plan = plan_route(
            state.params,
            num_output_tokens=state.num_output_tokens,
            has_prefill=self._placer.has_prefill,
            num_tokens=state.num_tokens,
            num_dropped_tokens=self._prefill.num_dropped_tokens,
        )
        state.replan(plan)
        placement = None
        if self._decode.is_open or plan.route is Route.PREFILL_ONLY:
            placement = self._placer.place(state, plan)
        if state.attempt == 0:
            admission = self._placer.admission(state, placement)
            if not admission.admits:
                return self.refuse(state, admission.reason, too_many(admission))
        return self.hold(state) if placement is None else self.send(state, placement)

    def send(self, state: RequestState, placement: Placement) -> Outputs:
        """Sends a request where it is to go."""
        self._dispatcher.send(state, placement)
        return []

    def hold(self, state: RequestState) -> Outputs:
        """Holds a request until a decode replica may have it, or its time is up."""
        if state.phase is not RequestPhase.WAITING:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(self._waits.replica_s, self._waited_too_long, state)
            self._metrics.phase_changed(state.wait(timer, time.monotonic()))
        return []

    def _waited_too_long(self, state: RequestState) -> None:
        reason = f"no decode replica for {self._waits.replica_s:g} s"
        self.deliver(self.refuse(state, "no_decode_replica", unavailable(reason)))

    def _first_token_too_late(self, state: RequestState) -> None:
        reason = f"no token within {self._waits.first_token_s:g} s"
        self.deliver(self.refuse(state, "queue_timeout", unavailable(reason)))

    # Out of an engine.

    def _stepped(self, replica: Replica, step: StepOutputs) -> None:
        """A replica has computed a step."""
        outputs: Outputs = []
        stopped: list[RequestState] = []
        for output in step.outputs:
            state = self._dispatcher.find(replica, output.request_id)
            if output.new_token_ids:
                replica.prefilling.pop(output.request_id, None)
            if output.finished:
                replica.complete(output.request_id)
            if state is None:
                if output.kv_transfer_params is not None:
                    # Aborted while this was under way; its KV is nobody's now.
                    replica.release(output.request_id)
            elif output.finish_reason == FinishReason.ABORT:
                # Not by us, so the engine is being stopped.
                stopped.append(state)
            else:
                outputs += self.isolated(self._computed, state, output)
        self.deliver(outputs)
        for state in stopped:
            for each in self._subscribers:
                each.stopped(state, replica)

    def _computed(self, state: RequestState, output: EngineCoreOutput) -> Outputs:
        if state.phase is RequestPhase.PREFILLING:
            return self._prefilled(state, output)
        return [self._decoded(state, output)]

    def _prefilled(self, state: RequestState, output: EngineCoreOutput) -> Outputs:
        """Prefill is done: the request ends here or goes on to decode."""
        self._metrics.queued(self._prefill.name, output)
        state.prefilled(output.prefill_stats)
        self._learn_cached(state, self._prefill, output)
        if state.route is Route.PREFILL_ONLY or output.finish_reason != FinishReason.LENGTH:
            return [self._forward(state, output)]
        forwarded = []
        if state.route is Route.PREFILL_FIRST:
            first = output.__copy__()
            first.finish_reason = None
            forwarded.append(self._forward(state, first))
        if not self._dispatcher.transfer(state, output.kv_transfer_params):
            # Nobody who is left can read it there: as if the KV were lost.
            return [*forwarded, *self.route(state)]
        return forwarded

    def _decoded(self, state: RequestState, output: EngineCoreOutput) -> EngineCoreOutput:
        if state.phase is RequestPhase.TRANSFERRING:
            self._metrics.queued(self._decode.name, output)
            change = state.enter(RequestPhase.DECODING, time.monotonic())
            self._metrics.phase_changed(change)
        if state.route is Route.DECODE_ONLY:
            self._learn_cached(state, self._decode, output)
        if state.prefill is not None:
            # Decode's own count would call the whole prompt cached.
            is_first = state.num_output_tokens == 0
            output.prefill_stats = state.prefill_stats if is_first else None
        return self._forward(state, output)

    def _learn_cached(self, state: RequestState, pool: Pool, output: EngineCoreOutput) -> None:
        """Compares what an engine found cached of a prompt with what it was thought to have."""
        if state.num_predicted_cached and output.prefill_stats is not None:
            num_cached = output.prefill_stats.num_cached_tokens
            pool.prefixes.observe(num_predicted=state.num_predicted_cached, num_cached=num_cached)
            state.observed_cached()

    def _forward(self, state: RequestState, output: EngineCoreOutput) -> EngineCoreOutput:
        """The output as the client's front end gets it; ends the request if it is the last."""
        output.request_id = state.request_id
        output.kv_transfer_params = None
        if output.new_token_ids:
            self._give(state, output.new_token_ids)
        if state.failures is not None:
            for each in self._subscribers:
                each.progressed(state)
        if output.finish_reason == FinishReason.ERROR:
            note_failure(state.note)
        if output.finished:
            self._end(state, str(output.finish_reason))
        return output

    def _give(self, state: RequestState, tokens: list[int]) -> None:
        out = state.add_tokens(tokens, time.monotonic())
        self._metrics.tokens_out(out)
        if out.ttft_s is not None:
            self._pending.discard(state)
            self._traffic.first_token(state.replica, out.ttft_s)
        if out.transfer_s is not None:
            self._predictor.observe_transfer(out.transfer_s)


def last_output(request_id: str, reason: FinishReason) -> EngineCoreOutput:
    """The one that ends a request, without a token."""
    return EngineCoreOutput(request_id, [], finish_reason=reason)
