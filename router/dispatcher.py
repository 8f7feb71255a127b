"""Requests on their way into engines, and out of them before their end.

Owns what engines call each request, which changes with every attempt. A message is sent first, and
what it changes is registered after it: of one that cannot be sent nothing is left but its name,
which whoever ends the request takes back with `forget`.
"""

import time
from typing import Any

from vllm.v1.engine import EngineCoreRequest

from router.deadline_order import deadline_s, latest_start_ms
from router.engine_requests import decode_request, prefill_request
from router.metrics import RouterMetrics
from router.phases import RequestPhase
from router.placement import Placement, Placer
from router.policies import ReplicaPlan
from router.pool import Pool, Replica
from router.request import RequestState
from router.reroute import MAX_ACKNOWLEDGEMENTS
from router.route_note import note_route
from router.routes import Route
from router.traffic import TrafficMeter


class Dispatcher:
    """Carries out placements."""

    def __init__(
        self,
        prefill: Pool,
        decode: Pool,
        placer: Placer,
        *,
        ttft_s: float,
        asks_acknowledgements: bool,
        metrics: RouterMetrics,
        traffic: TrafficMeter,
    ) -> None:
        """`asks_acknowledgements`: of prefill replicas; prompts may be rerouted then."""
        self._prefill = prefill
        self._decode = decode
        self._placer = placer
        self._ttft_s = ttft_s
        self._asks_acknowledgements = asks_acknowledgements
        self._metrics = metrics
        self._traffic = traffic
        self._in_engines: dict[str, RequestState] = {}

    def find(self, replica: Replica, engine_request_id: str) -> RequestState | None:
        """The request of that name, if it is this replica that works on it now."""
        state = self._in_engines.get(engine_request_id)
        return state if state is not None and state.replica is replica else None

    def send(self, state: RequestState, placement: Placement) -> None:
        """Sends a request where it is to go, under a new name.

        Raises:
            CannotBeSent: it holds what no message can.
        """
        plan, prefill_at = placement.plan, placement.prefill_at
        if state.attempt == 0:
            self._traffic.arrived(prefill_s=placement.prefill_s, num_tokens=state.num_tokens)
        self._metrics.routed(plan, prefill_at)
        note_route(state.note, f"{plan.route.name.lower()};reason={plan.reason}")
        self.forget(state)
        state.begin_attempt(plan, num_predicted_cached=prefill_at.num_cached_tokens)
        self._in_engines[state.engine_request_id] = state
        if plan.route is Route.DECODE_ONLY:
            replica = self._decode[prefill_at.replica_id]
            work_s = self._placer.local_share_s(state, placement)
            request = decode_request(state, None, step_limit_s=placement.step_limit_s)
            self._to_decode(state, replica, request, work_s)
            replica.prefilling[state.engine_request_id] = prefill_at.request_s
        else:
            self._to_prefill(state, prefill_at)

    def transfer(self, state: RequestState, kv_transfer_params: dict[str, Any] | None) -> bool:
        """Sends a request that prefill is done with on to decode.

        False where no decode replica can read its KV, which is released then.
        """
        assert state.prefill is not None
        work_s = self._placer.decode_share_s(state)
        replica_id = self._placer.decode_replica(state, state.prefill, work_s)
        if replica_id is None:
            self._release_kv(state)
            return False
        request = decode_request(state, kv_transfer_params)
        self._to_decode(state, self._decode[replica_id], request, work_s)
        return True

    def stays(self, state: RequestState, replica: Replica) -> None:
        """A prompt is prefilled where it is: it will be cached there."""
        self._prefill.prefixes.add(replica.replica_id, state.chain)

    def withdraw(self, state: RequestState) -> None:
        """Takes a request from the engines. Decode tells prefill that its blocks are not needed;
        where decode does not have it, this does."""
        if state.replica is not None and state.replica.has(state.engine_request_id):
            state.replica.abort(state.engine_request_id)
        elif state.phase in (RequestPhase.PREFILLING, RequestPhase.TRANSFERRING):
            self._release_kv(state)

    def forget(self, state: RequestState) -> None:
        """A request's name stands for nothing any more."""
        self._in_engines.pop(state.engine_request_id, None)

    def _to_prefill(self, state: RequestState, prefill_at: ReplicaPlan) -> None:
        samples = state.route is not Route.DECODE_FIRST
        transfers_kv = state.route is not Route.PREFILL_ONLY
        request = prefill_request(state, samples=samples, transfers_kv=transfers_kv)
        request.priority = latest_start_ms(
            arrival_s=request.arrival_time,
            prefill_s=prefill_at.request_s,
            ttft_s=self._ttft_s,
            client_priority=request.priority,
        )
        # From receipt on: the time of day, of which the other two are, may be set meanwhile.
        due_s = deadline_s(request.priority, prefill_s=prefill_at.request_s)
        due_s += state.received_s - request.arrival_time
        replica = self._prefill[prefill_at.replica_id]
        asks_load = (
            self._asks_acknowledgements and state.num_acknowledgements < MAX_ACKNOWLEDGEMENTS
        )
        replica.add(
            request,
            prefill_at.request_s,
            deadline_s=due_s,
            asks_load=asks_load,
        )
        if (change := state.sent_to_prefill(replica, time.monotonic())) is not None:
            self._metrics.phase_changed(change)
        if not asks_load:
            self.stays(state, replica)

    def _to_decode(
        self, state: RequestState, replica: Replica, request: EngineCoreRequest, work_s: float
    ) -> None:
        replica.add(request, work_s, is_suspect=state.is_suspect)
        self._metrics.phase_changed(state.sent_to_decode(replica, time.monotonic()))

    def _release_kv(self, state: RequestState) -> None:
        """Frees what prefill keeps for a decode that will not come. Harmless once it was pulled."""
        if state.prefill is not None:
            state.prefill.release(state.engine_request_id)
