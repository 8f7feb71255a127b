"""What becomes of requests that their engine does not finish: they go on in another, or end.

Follows what replicas say beside outputs: that they are there, have a prompt, do not take one, are
gone. Owns the quarantine of suspects. Whether a request goes on is decided in `router.recovery`,
whether a prompt is rerouted in `router.reroute`; every step that is taken for it goes through
`RequestLifecycle.isolated`.
"""

import logging
import time
from collections import deque
from collections.abc import Callable

from engine.wire import Rejection, StepOutputs
from router.dispatcher import Dispatcher
from router.faults import FAILURES, HANGS, Fault
from router.lifecycle import Outputs, RequestEvents, RequestLifecycle
from router.metrics import RouterMetrics
from router.phases import RequestPhase
from router.placement import Placer
from router.pool import Pool, PoolEvents, Replica
from router.quarantine import Quarantine
from router.recovery import Failures, Hang, RecoveryLimits, one_more, plan_failover
from router.refusals import rejected
from router.request import RequestState
from router.routes import Route, RoutePlan

logger = logging.getLogger(__name__)

_HANGS_KEPT = 100
"""The last ones: what several have in common is seen of a few."""


class Failover:
    """Has one router's requests outlive their engines."""

    def __init__(
        self,
        prefill: Pool,
        decode: Pool,
        *,
        lifecycle: RequestLifecycle,
        dispatcher: Dispatcher,
        placer: Placer,
        limits: RecoveryLimits,
        metrics: RouterMetrics,
        clock: Callable[[], float],
    ) -> None:
        """`clock` says when replicas hang."""
        self._decode = decode
        self._lifecycle = lifecycle
        self._dispatcher = dispatcher
        self._placer = placer
        self._limits = limits
        self._metrics = metrics
        self._clock = clock
        self._hangs: deque[Hang] = deque(maxlen=_HANGS_KEPT)
        self._quarantine: Quarantine[RequestState] = Quarantine()
        lifecycle.subscribe(
            RequestEvents(stopped=self._stopped, progressed=self._progressed, ended=self._ended)
        )
        for pool in (prefill, decode):
            pool.subscribe(
                PoolEvents(
                    opened=self._opened,
                    stepped=self._stepped,
                    acknowledged=self._acknowledged,
                    rejected=self._rejected,
                    gone=self._gone,
                )
            )

    @property
    def suspects(self) -> tuple[RequestState, ...]:
        """Those in quarantine, with a replica and without."""
        return self._quarantine.all

    @property
    def waiting_suspects(self) -> tuple[RequestState, ...]:
        """Those of them that wait for a replica, in order."""
        return self._quarantine.waiting

    # What requests do.

    def _stopped(self, state: RequestState, replica: Replica) -> None:
        cause = f"{replica.pool.name}_stopped"
        self._lifecycle.deliver(
            self._lifecycle.isolated(
                self._go_on, state, cause=cause, failures=state.failures, is_blameless=True
            )
        )

    def _progressed(self, state: RequestState) -> None:
        if state.failures is not None and state.failures.clears(state.num_output_tokens):
            state.cleared()
            if self._quarantine.leave(state):
                if state.replica is not None:
                    state.replica.clear(state.engine_request_id)
                self._lifecycle.deliver(self._send_suspects())

    def _ended(self, state: RequestState) -> None:
        if self._quarantine.leave(state):
            self._lifecycle.deliver(self._send_suspects())

    # What replicas say.

    def _opened(self, replica: Replica) -> None:
        """A replica may get new work: those that wait for one go on."""
        if replica.pool is not self._decode:
            return
        for state in list(self._lifecycle.requests.values()):
            # Those before it may have sent it on, or ended it.
            if state.phase is RequestPhase.WAITING:
                self._lifecycle.deliver(self._lifecycle.isolated(self._restart, state))
        self._lifecycle.deliver(self._send_suspects())

    def _stepped(self, replica: Replica, step: StepOutputs) -> None:
        if self._quarantine.next is not None:
            # The replica may have said that another router's suspect has left it.
            self._lifecycle.deliver(self._send_suspects())

    def _acknowledged(self, replica: Replica, engine_request_id: str) -> None:
        """A prefill replica has a prompt, and has just said what is ahead of it."""
        if (state := self._dispatcher.find(replica, engine_request_id)) is not None:
            self._lifecycle.deliver(self._lifecycle.isolated(self._reroute, state, replica))

    def _reroute(self, state: RequestState, replica: Replica) -> Outputs:
        state.acknowledged()
        assert state.plan is not None
        better = self._placer.better(state, state.plan, here_s=replica.work_s)
        if better is None:
            self._dispatcher.stays(state, replica)
            return []
        self._metrics.rerouted()
        self._dispatcher.withdraw(state)
        state.rerouted()
        return self._lifecycle.send(state, better)

    def _rejected(self, replica: Replica, rejection: Rejection) -> None:
        if (state := self._dispatcher.find(replica, rejection.request_id)) is not None:
            self._lifecycle.deliver(self._lifecycle.isolated(self._sent_back, state, rejection))

    def _sent_back(self, state: RequestState, rejection: Rejection) -> Outputs:
        if rejection.has_suspect:
            return self._restart(state)
        return self._lifecycle.refuse(state, "rejected", rejected(rejection.reason))

    def _gone(self, replica: Replica) -> None:
        """A replica's connection has ended: what it had goes on elsewhere."""
        outputs: Outputs = []
        requests = list(self._lifecycle.requests.values())
        had = [state for state in requests if state.replica is replica]
        hang = None
        if replica.fault in HANGS:
            hang = Hang(replica_id=replica.replica_id, at_s=self._clock())
            self._hangs.append(hang)
        if len(had) == 1 and replica.exit is not None and replica.exit.num_requests == 1:
            had[0].failed_alone()
        for state in requests:
            if state.replica is replica or (
                state.prefill is replica and state.phase is RequestPhase.TRANSFERRING
            ):
                outputs += self._lifecycle.isolated(self._lost, state, replica, hang)
        self._lifecycle.deliver(outputs)

    def _lost(self, state: RequestState, replica: Replica, hang: Hang | None) -> Outputs:
        """A request has lost a replica."""
        fault = replica.fault
        how = fault.value if fault is not None else replica.load.leaves_because or "left"
        failures = state.failures
        # Where its blocks went with prefill, a decode that has pulled them loses little.
        self._dispatcher.withdraw(state)
        if state.replica is replica and hang is not None:
            state.hung()
        if state.replica is replica and fault in FAILURES:
            failures = one_more(
                failures,
                num_tokens=state.num_output_tokens,
                was_prefilling=state.phase is RequestPhase.PREFILLING,
                hang=hang,
                all_hangs=self._hangs,
                stall_timeout_s=self._limits.stall_timeout_s,
            )
        return self._go_on(
            state,
            cause=f"{replica.pool.name}_{how}",
            failures=failures,
            is_blameless=fault is not Fault.ENGINE_ENDED,
        )

    # What is done for a request.

    def _go_on(
        self, state: RequestState, *, cause: str, failures: Failures | None, is_blameless: bool
    ) -> Outputs:
        """Starts a request again that no engine has any more, or gives it up."""
        state.suspected(failures)
        plan = plan_failover(
            num_failovers=state.num_failovers + state.num_blameless_failovers,
            failures=failures,
            num_alone=state.num_alone_failures,
            num_hangs=state.num_hangs,
            limits=self._limits,
        )
        if not plan.goes_on:
            return self._lifecycle.fail(state, f"{cause}; {plan.reason}")
        self._metrics.failed_over(cause)
        logger.info("request %s moves: %s", state.request_id, cause)
        state.failed_over(time.monotonic(), is_blameless=is_blameless)
        return self._restart(state)

    def _restart(self, state: RequestState) -> Outputs:
        """Sends what is left of a request to its next engine; a suspect only to one apart."""
        if not state.is_suspect:
            return self._lifecycle.route(state)
        state.replan(RoutePlan(route=Route.DECODE_ONLY, reason="suspect"))
        self._lifecycle.hold(state)
        if not self._decode.is_open:
            return []
        self._quarantine.wait(state)
        return self._send_suspects()

    def _send_suspects(self) -> Outputs:
        """Sends those suspects for which there is a replica without one."""
        outputs: Outputs = []
        while (state := self._quarantine.next) is not None:
            placement = self._placer.place_apart(state, self._quarantine.occupied)
            if placement is None:
                break
            self._quarantine.enter(state, placement.prefill_at.replica_id)
            outputs += self._lifecycle.isolated(self._lifecycle.send, state, placement)
        return outputs
