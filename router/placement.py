"""Where a request goes next: what the pools predict, put before the plans that decide. Pure.

Owns no state: the pools own what they know. Never sends anything.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Protocol

from router.admission import AdmissionPlan, DecodeOutlook, Expectation, plan_admission
from router.errors import NoReplica
from router.local_prefill import STEP_SHARE, DecodeCandidate, plan_local_prefill
from router.pairs import Pairs
from router.planner import PlannedReplica, PoolPlanner
from router.policies import ReplicaPlan
from router.prediction import Predictor
from router.reroute import is_rerouted
from router.routes import Route, RoutePlan
from router.settings import RoutingSettings


class PlacedRequest(Protocol):
    """What placement needs of a request."""

    @property
    def num_tokens(self) -> int:
        """Of prompt and response so far."""

    @property
    def num_output_tokens(self) -> int: ...
    @property
    def max_tokens(self) -> int | None: ...
    def blocks(self, block_size: int | None) -> Sequence[int]:
        """Hashes of the blocks of its tokens: see router.prefixes."""


class NewRequest(PlacedRequest, Protocol):
    """What admission needs of a request."""

    @property
    def num_ahead(self) -> int:
        """Requests without a first token when it came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A route for a request, and the replica at its beginning."""

    plan: RoutePlan
    prefill_at: ReplicaPlan
    """The replica that prefills: of prefill, or of decode where decode does it all."""
    ttft_s: float
    """Until its first token, as predicted."""
    prefill_s: float
    """Predicted engine seconds that it asks of the prefill pool, or would if that had room."""
    step_limit_s: float | None = None
    """Where decode prefills in pieces: how long a step with one may take."""


class Placer:
    """Plans routes over two pools."""

    def __init__(
        self,
        prefill: PoolPlanner,
        decode: PoolPlanner,
        settings: RoutingSettings,
        *,
        pairs: Pairs,
        num_routers: int,
        predictor: Predictor,
    ) -> None:
        self._prefill = prefill
        self._decode = decode
        self._settings = settings
        self._pairs = pairs
        self._num_routers = num_routers
        self._predictor = predictor

    @property
    def has_prefill(self) -> bool:
        """Whether a prefill replica may get work that a decode replica can go on with."""
        return self._prefill.ledger.has_open(self._stranded())

    def place(self, state: PlacedRequest, plan: RoutePlan) -> Placement:
        """A placement that follows `plan`, or that has decode prefill where that is better.

        Raises:
            NoReplica: the plan needs a pool in which no replica may get new work.
        """
        num_tokens = state.num_tokens
        if plan.route is Route.DECODE_ONLY:
            chain = state.blocks(self._decode.block_size)
            prefill_at = self._decode.plan_prefill(chain, num_tokens)
            # Without a prefill replica all prompts come here, and nothing else prefills them.
            limit_s = STEP_SHARE * self._settings.slo.itl_s if self.has_prefill else None
            return Placement(
                plan=plan,
                prefill_at=prefill_at,
                ttft_s=self._decode_candidate(prefill_at).ttft_s(limit_s),
                prefill_s=prefill_at.request_s,
                step_limit_s=limit_s,
            )
        chain = state.blocks(self._prefill.block_size)
        barred: Set[str] = frozenset()
        if plan.route is not Route.PREFILL_ONLY:
            barred = self._stranded()
        prefill_at = self._prefill.plan_prefill(chain, num_tokens, barred=barred)
        if self._settings.local_prefill and plan.route is not Route.PREFILL_ONLY:
            own = self._decode.plan_prefill(chain, num_tokens)
            local = plan_local_prefill(
                self._decode_candidate(own),
                prefill_s=prefill_at.finish_s,
                transfer_s=self._predictor.transfer_s(num_tokens),
                ttft_s=self._settings.slo.ttft_s,
                itl_s=self._settings.slo.itl_s,
            )
            if local is not None:
                return Placement(
                    plan=RoutePlan(route=Route.DECODE_ONLY, reason=local.reason),
                    prefill_at=own,
                    ttft_s=local.ttft_s,
                    prefill_s=prefill_at.request_s if local.relieves_prefill else 0.0,
                    step_limit_s=local.step_limit_s,
                )
        return Placement(
            plan=plan,
            prefill_at=prefill_at,
            ttft_s=prefill_at.finish_s,
            prefill_s=prefill_at.request_s,
        )

    def better(self, state: PlacedRequest, plan: RoutePlan, *, here_s: float) -> Placement | None:
        """A placement that is worth a reroute; None where the prompt stays.

        `here_s`: until it is prefilled where it is, as its replica has just said.
        """
        try:
            placement = self.place(state, plan)
        except NoReplica:
            return None
        is_better = is_rerouted(
            here_s=here_s,
            there_s=placement.ttft_s,
            request_s=placement.prefill_at.request_s,
        )
        return placement if is_better else None

    def place_apart(self, state: PlacedRequest, occupied: Set[str]) -> Placement | None:
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
        prefill_at = ReplicaPlan(
            replica_id=replica.replica_id,
            reason="no other suspect there",
            wait_s=replica.work_s,
            request_s=self._decode.cost.prefill.seconds(
                num_uncached=num_tokens, num_tokens=num_tokens
            ),
        )
        return Placement(
            plan=RoutePlan(route=Route.DECODE_ONLY, reason="suspect"),
            prefill_at=prefill_at,
            ttft_s=prefill_at.finish_s,
            prefill_s=prefill_at.request_s,
        )

    def decode_replica(
        self, state: PlacedRequest, prefill: PlannedReplica, work_s: float
    ) -> str | None:
        """The decode replica that goes on with what a prefill replica has computed.

        None where no open one can read there: then the prompt must be prefilled anew.
        """
        barred = self._pairs.barred(prefill.replica_id)
        if not self._decode.ledger.has_open(barred):
            return None
        num_output = self._predictor.output_tokens(state.max_tokens)
        plan = self._decode.plan_transfer(
            prefill.replica_id,
            work_s,
            num_bytes=self._rank_bytes(prefill, state.num_tokens),
            num_steps=max(1, num_output - state.num_output_tokens),
            barred=barred,
        )
        return plan.replica_id

    def _rank_bytes(self, prefill: PlannedReplica, num_tokens: int) -> float | None:
        """Of so much KV, what each rank reads; None where that is not known."""
        if prefill.kv_bytes_per_token is None or (reader := next(iter(self._decode), None)) is None:
            return None
        # All ranks of the side that has more of them read at once, each its part.
        return num_tokens * prefill.kv_bytes_per_token / max(prefill.num_ranks, reader.num_ranks)

    def _stranded(self) -> Set[str]:
        return self._pairs.stranded(self._decode.ledger.open_ids)

    def admission(self, state: NewRequest, placement: Placement | None) -> AdmissionPlan:
        """Whether a new request is taken, now that it has a placement, or none."""
        limits = self._settings.admission
        ttft_s = itl_s = 0.0
        if limits.refuses and placement is not None:
            ttft_s = placement.ttft_s
            itl_s = self._outlook(state).itl_s(ttft_s) if self._decode.is_open else 0.0
        expected = Expectation(ttft_s=ttft_s, itl_s=itl_s, num_queued=state.num_ahead)
        return plan_admission(expected, self._settings.slo, limits)

    def decode_share_s(self, state: PlacedRequest) -> float:
        """What a request adds to each decode step that it is part of, on average."""
        num_output = self._predictor.output_tokens(state.max_tokens)
        cost = self._decode.cost.decode
        return cost.share_s(num_context_tokens=state.num_tokens + num_output / 2)

    def local_share_s(self, state: PlacedRequest, placement: Placement) -> float:
        """The same where decode prefills too: once, spread over the steps of its stay."""
        num_output = self._predictor.output_tokens(state.max_tokens)
        return self.decode_share_s(state) + placement.prefill_at.request_s / num_output

    def _decode_candidate(self, prefill_at: ReplicaPlan) -> DecodeCandidate:
        replica = self._decode[prefill_at.replica_id]
        return DecodeCandidate(
            base_s=self._decode.cost.decode.base_s,
            answers_s=prefill_at.wait_s,
            prefilling_s=replica.prefilling_s,
            request_s=prefill_at.request_s,
            kv_usage_fraction=replica.load.kv_usage_fraction,
            has_room=replica.load.num_waiting == 0,
            is_cached=prefill_at.num_cached_tokens > 0,
        )

    def _outlook(self, state: PlacedRequest) -> DecodeOutlook:
        ledger = self._decode.ledger
        return DecodeOutlook(
            cost=self._decode.cost.decode,
            mean_work_s=ledger.mean_work_s,
            num_replicas=len(ledger),
            # Those of other routers are taken to be as many as ours.
            num_arriving=self._prefill.ledger.num_outstanding * self._num_routers,
            share_s=self.decode_share_s(state),
            num_output_tokens=self._predictor.output_tokens(state.max_tokens),
        )
