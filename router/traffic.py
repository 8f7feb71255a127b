"""What a router counts for scaling: what arrives, and how many requests meet their targets.

Owns the counts, which only go up. Who scales takes differences of what it is told, so that a report
that is lost costs nothing. Never decides anything.
"""

import logging
import time
from collections.abc import Collection
from dataclasses import replace

from router.costs import DecodeCost, PrefillCost
from router.phases import RequestPhase
from router.pool import Pool, Replica
from router.request import RequestState
from router.scaling_report import PoolSize, ScalingReport, TrafficCounts
from router.slo import Slo
from router.slo_feasibility import BestCase, describe_infeasible, predict_best

logger = logging.getLogger(__name__)

ENOUGH_MEASURED = 50
"""Requests after which the best of them is taken for the best that can be had."""

WARM_UP_S = 10.0
"""What a replica does in its first seconds tells nothing about it: kernels and caches are cold."""


class TrafficMeter:
    """Counts one router's traffic against the targets."""

    def __init__(self, slo: Slo) -> None:
        self._slo = slo
        self._counts = TrafficCounts()
        self._best = BestCase(ttft_s=None, itl_s=None)

    def predict(self, prefill: PrefillCost, decode: DecodeCost) -> None:
        """Warns of targets that are infeasible, before anything was measured."""
        self._warn_infeasible(predict_best(prefill, decode), "predicted")

    def arrived(self, *, prefill_s: float, num_tokens: int) -> None:
        """A request was routed for the first time; `prefill_s` is what it asks of prefill."""
        self._counts += TrafficCounts(
            arrivals=1,
            arrived_prefill_s=prefill_s,
            arrived_prefill_squared_s2=prefill_s**2,
            prompt_tokens=num_tokens,
        )

    def first_token(self, replica: Replica | None, ttft_s: float) -> None:
        """A request got its first token, from `replica`."""
        if _is_warm(replica):
            self._counts += TrafficCounts(ttft_measured=1, ttft_met=int(ttft_s <= self._slo.ttft_s))
            self._best = replace(self._best, ttft_s=min(ttft_s, self._best.ttft_s or ttft_s))

    def ended(self, replica: Replica | None, num_tokens: int, writing_s: float) -> None:
        """A request ended, `writing_s` after its first token."""
        self._counts += TrafficCounts(ended=1, output_tokens=num_tokens)
        if num_tokens > 1 and _is_warm(replica):
            itl_s = writing_s / (num_tokens - 1)
            self._counts += TrafficCounts(itl_measured=1, itl_met=int(itl_s <= self._slo.itl_s))
            self._best = replace(self._best, itl_s=min(itl_s, self._best.itl_s or itl_s))
            if self._counts.itl_measured == ENOUGH_MEASURED:
                self._warn_infeasible(self._best, "measured")

    def _warn_infeasible(self, best: BestCase, how: str) -> None:
        for line in describe_infeasible(best, self._slo, how=how):
            logger.warning(line)

    def report(
        self,
        *,
        prefill: Pool,
        decode: Pool,
        requests: Collection[RequestState],
    ) -> ScalingReport:
        """The counts, what is outstanding now, and what the cost models say.

        `requests` are all that this router has, those that wait for a replica among them.
        """
        unread = [each.num_tokens for each in requests if each.last_token_s is None]
        facts = [replica.facts for replica in decode]
        usage = [replica.load.kv_usage_fraction for replica in decode]
        cost = prefill.cost.prefill
        return ScalingReport(
            counts=self._counts,
            prefill_backlog_s=sum(
                cost.seconds(num_uncached=num_tokens, num_tokens=num_tokens)
                for num_tokens in unread
            ),
            num_decoding=sum(each.phase is not RequestPhase.PREFILLING for each in requests),
            kv_usage_fraction=sum(usage) / len(usage) if usage else 0.0,
            num_kv_tokens=max(
                (each.num_kv_blocks * each.block_size for each in facts), default=None
            ),
            max_batch=max((each.max_num_seqs for each in facts), default=None),
            decode_cost=decode.cost.decode,
            prefill=_size(prefill),
            decode=_size(decode),
        )


def _size(pool: Pool) -> PoolSize:
    leaving = [replica.is_leaving for replica in pool]
    return PoolSize(num_ready=leaving.count(False), num_draining=leaving.count(True))


def _is_warm(replica: Replica | None) -> bool:
    return replica is not None and time.monotonic() - replica.joined_s > WARM_UP_S
