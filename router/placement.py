"""Where a request goes next: what the pools predict, put before the plans that decide.

Owns no state: the pools own what they know. Never sends anything.
"""

from collections.abc import Callable, Set
from dataclasses import dataclass

from router.admit import AdmissionPlan, DecodeOutlook, Expectation, plan_admission
from router.handoff import HandoffPlan, Route
from router.local_prefill import STEP_SHARE, DecodeReader, plan_local_prefill
from router.pairs import Pairs
from router.policies import RoutePlan
from router.pool import Pool, Replica
from router.request import RequestState
from router.settings import Targets


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A way for a request."""

    plan: HandoffPlan
    reader: RoutePlan
    """The replica that reads the prompt: of prefill, or of decode where decode does it all."""
    ttft_s: float
    """Until its first token, as predicted."""
    prefill_s: float
    """Predicted engine seconds that it asks of the prefill pool, or would if that had room."""
    step_limit_s: float | None = None
    """Where decode reads the prompt in pieces: how long a step may take that reads one."""


class Placer:
    """Plans ways over two pools."""

    def __init__(
        self,
        prefill: Pool,
        decode: Pool,
        targets: Targets,
        *,
        pairs: Pairs,
        num_routers: int,
        expected_output_tokens: Callable[[int | None], int],
        handover_s: Callable[[], float],
    ) -> None:
        self._prefill = prefill
        self._decode = decode
        self._targets = targets
        self._pairs = pairs
        self._num_routers = num_routers
        self._expected_output_tokens = expected_output_tokens
        self._handover_s = handover_s

    @property
    def has_prefill(self) -> bool:
        """Whether a prefill replica may get work that a decode replica can go on with."""
        return self._prefill.ledger.has_open(self._stranded())

    def place(self, state: RequestState, plan: HandoffPlan) -> Placement:
        """A way that follows `plan`, or that has decode read the prompt where that is better.

        Raises:
            NoReplica: the plan needs a pool in which no replica may get new work.
        """
        num_tokens = state.num_tokens
        if plan.route is Route.DECODE_ONLY:
            chain = state.blocks(self._decode.block_size)
            reader = self._decode.plan_prefill(chain, num_tokens)
            # Without a prefill replica all prompts come here, and nothing else reads them.
            limit_s = STEP_SHARE * self._targets.admission.itl_s if self.has_prefill else None
            return Placement(
                plan=plan,
                reader=reader,
                ttft_s=self._decode_reader(reader).ttft_s(limit_s),
                prefill_s=reader.request_s,
                step_limit_s=limit_s,
            )
        chain = state.blocks(self._prefill.block_size)
        barred: Set[str] = frozenset()
        if plan.route is not Route.PREFILL_ONLY:
            barred = self._stranded()
        reader = self._prefill.plan_prefill(chain, num_tokens, barred=barred)
        if self._targets.local_prefill and plan.route is not Route.PREFILL_ONLY:
            own_reader = self._decode.plan_prefill(chain, num_tokens)
            local = plan_local_prefill(
                self._decode_reader(own_reader),
                prefill_s=reader.finish_s,
                handover_s=self._handover_s(),
                ttft_s=self._targets.admission.ttft_s,
                itl_s=self._targets.admission.itl_s,
            )
            if local is not None:
                return Placement(
                    plan=HandoffPlan(route=Route.DECODE_ONLY, reason=local.reason),
                    reader=own_reader,
                    ttft_s=local.ttft_s,
                    prefill_s=reader.request_s if local.relieves_prefill else 0.0,
                    step_limit_s=local.step_limit_s,
                )
        return Placement(
            plan=plan, reader=reader, ttft_s=reader.finish_s, prefill_s=reader.request_s
        )

    def place_apart(self, state: RequestState, occupied: Set[str]) -> Placement | None:
        """A decode replica for a suspect, which does the whole request; None while there is none.

        Never one of `occupied`, nor one with another router's suspect. Of the others the one with
        the fewest requests, as these lose their engine if the suspect is guilty.
        """
        free = [
            replica
            for replica in self._decode
            if not replica.is_leaving
            and replica.replica_id not in occupied
            and not replica.load.has_suspect
        ]
        if not free:
            return None
        ledger, num_tokens = self._decode.ledger, state.num_tokens
        replica = min(
            free,
            key=lambda each: (
                max(each.load.num_running, ledger.num_sent(each.replica_id)),
                each.replica_id,
            ),
        )
        reader = RoutePlan(
            replica_id=replica.replica_id,
            reason="no other suspect there",
            wait_s=replica.work_s,
            request_s=self._decode.cost.prefill.seconds(
                num_uncached=num_tokens, num_tokens=num_tokens
            ),
        )
        return Placement(
            plan=HandoffPlan(route=Route.DECODE_ONLY, reason="suspect"),
            reader=reader,
            ttft_s=reader.finish_s,
            prefill_s=reader.request_s,
        )

    def decode_replica(self, state: RequestState, prefill: Replica, work_s: float) -> str | None:
        """The decode replica that goes on with what a prefill replica has read.

        None where no open one can read there: then the prompt must be read anew.
        """
        barred = self._pairs.barred(prefill.replica_id)
        if not self._decode.ledger.has_open(barred):
            return None
        num_output = self._expected_output_tokens(state.params.max_tokens)
        plan = self._decode.plan_handover(
            prefill,
            work_s,
            num_tokens=state.num_tokens,
            num_steps=max(1, num_output - state.num_output_tokens),
            barred=barred,
        )
        return plan.replica_id

    def _stranded(self) -> Set[str]:
        return self._pairs.stranded(self._decode.ledger.open_ids)

    def admission(self, state: RequestState, placement: Placement | None) -> AdmissionPlan:
        """Whether a new request is taken, now that its way is known; None while there is none."""
        limits = self._targets.admission
        ttft_s = itl_s = 0.0
        if limits.refuses and placement is not None:
            ttft_s = placement.ttft_s
            itl_s = self._outlook(state).itl_s(ttft_s) if self._decode.is_open else 0.0
        expected = Expectation(ttft_s=ttft_s, itl_s=itl_s, num_queued=state.num_ahead)
        return plan_admission(expected, limits)

    def decode_share_s(self, state: RequestState) -> float:
        """What a request adds to each decode step that it is part of, on average."""
        num_output = self._expected_output_tokens(state.params.max_tokens)
        cost = self._decode.cost.decode
        return cost.share_s(num_context_tokens=state.num_tokens + num_output / 2)

    def local_share_s(self, state: RequestState, placement: Placement) -> float:
        """The same where decode reads the prompt too: once, spread over the steps of its stay."""
        num_output = self._expected_output_tokens(state.params.max_tokens)
        return self.decode_share_s(state) + placement.reader.request_s / num_output

    def _decode_reader(self, reader: RoutePlan) -> DecodeReader:
        replica = self._decode[reader.replica_id]
        return DecodeReader(
            base_s=self._decode.cost.decode.base_s,
            answers_s=reader.wait_s,
            reading_s=replica.reading_s,
            request_s=reader.request_s,
            kv_usage_fraction=replica.load.kv_usage_fraction,
            has_room=replica.load.num_waiting == 0,
            is_cached=reader.num_cached_tokens > 0,
        )

    def _outlook(self, state: RequestState) -> DecodeOutlook:
        ledger = self._decode.ledger
        return DecodeOutlook(
            cost=self._decode.cost.decode,
            mean_work_s=ledger.mean_work_s,
            num_replicas=len(ledger),
            # Those of other routers are taken to be as many as ours.
            num_arriving=self._prefill.ledger.num_outstanding * self._num_routers,
            share_s=self.decode_share_s(state),
            num_output_tokens=self._expected_output_tokens(state.params.max_tokens),
        )
