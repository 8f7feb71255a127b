"""One application's scaling: it observes what Serve tells of its deployments, plans, and says so.

Runs in Serve's controller, called by the policies of the deployments in turn. Owns the reports, the
state of the plan, its log and its metrics. The decisions are cluster.scaling's.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from ray.serve.config import AutoscalingContext

from cluster.internals import check_internals
from cluster.reports import UNKNOWN_ENGINES, Look, Observed, Reports
from cluster.scale_metrics import ScaleMetrics
from cluster.scaling import (
    Load,
    PoolCounts,
    PoolPlan,
    ScalePlan,
    ScaleSettings,
    ScaleSnapshot,
    ScaleState,
    plan_scale,
)
from cluster.scaling_args import settings_from
from kvtransfer.phase import PHASES
from router.scaling_report import ScalingReport

# A child of Serve's own logger: its handlers write the controller's log.
logger = logging.getLogger("ray.serve.pdserve")

ROUTER = "router"
DEPLOYMENTS = {ROUTER, "prefill", "decode"}
FORGET_S = 30.0
"""An application that Serve does not ask about for this long was deleted: one of the same name that
comes later is another. So it is where the time of day has been set anew by that much."""


class Planner:
    """Plans both pools at once, every `interval_s`, whichever deployment Serve asks about."""

    def __init__(
        self, settings: ScaleSettings, *, interval_s: float, metrics: ScaleMetrics
    ) -> None:
        self._settings = settings
        self._interval_s = interval_s
        self._metrics = metrics
        self._asked_s = 0.0
        self._forget()

    def _forget(self) -> None:
        self._next_s = 0.0
        self._contexts: dict[str, AutoscalingContext] = {}
        self._reports = Reports()
        self._engines = UNKNOWN_ENGINES
        self._state = ScaleState()
        self._plan: ScalePlan | None = None

    def observe(self, context: AutoscalingContext) -> int:
        """Takes in what Serve knows of one deployment now; returns the size it should have."""
        now_s: float = context.current_time
        name = context.deployment_name
        if abs(now_s - self._asked_s) > FORGET_S:
            self._forget()
        self._asked_s = now_s
        self._contexts[name] = context
        if now_s >= self._next_s and self._contexts.keys() == DEPLOYMENTS:
            self._next_s = now_s + self._interval_s
            self._decide(now_s)
        target: int = context.target_num_replicas
        if self._plan is None or name == ROUTER:
            return target
        return (self._plan.prefill if name == "prefill" else self._plan.decode).target

    def _decide(self, now_s: float) -> None:
        observed = self._reports.observe(_looks(self._contexts[ROUTER]), now_s)
        if observed is not None:
            self._engines = observed.engines
        before = self._plan
        self._plan = plan_scale(
            ScaleSnapshot(
                now_s=now_s,
                traffic=None if observed is None else observed.traffic,
                load=Load() if observed is None else observed.load,
                prefill=_counts(self._contexts["prefill"], observed),
                decode=_counts(self._contexts["decode"], observed),
                engines=self._engines,
            ),
            self._settings,
            self._state,
        )
        self._state = self._plan.state
        for pool in PHASES:
            plan: PoolPlan = getattr(self._plan, pool)
            target = self._contexts[pool].target_num_replicas
            self._metrics.observe(pool, plan, is_change=plan.target != target)
            old: PoolPlan | None = getattr(before, pool, None)
            if old is None or _said(old) != _said(plan):
                logger.info(describe(pool, plan))


def describe(pool: str, plan: PoolPlan) -> str:
    """One line: the decision, what keeps it, why, and the numbers it was made from."""
    held = f", held by {plan.held_by}" if plan.held_by else ""
    inputs = ", ".join(f"{name} {value:.4g}" for name, value in plan.inputs)
    return f"{pool}: {plan.target} replicas, {plan.needed} needed{held}: {plan.reason} ({inputs})"


def _said(plan: PoolPlan) -> tuple[object, ...]:
    return plan.target, plan.needed, plan.held_by


def _counts(context: AutoscalingContext, observed: Observed | None) -> PoolCounts:
    """Replicas by what they are.

    Ready is what routers may send requests to: Serve's running replicas are still being warmed up.
    """
    name = context.deployment_name
    running: int = context.current_num_replicas
    ready = running if observed is None else min(running, observed.num_ready[name])
    return PoolCounts(
        num_ready=ready,
        num_starting=max(0, context.target_num_replicas - ready),
        num_draining=0 if observed is None else observed.num_draining[name],
    )


def _looks(context: AutoscalingContext) -> Iterator[Look]:
    """All looks at the routers that Serve keeps: those of dead routers are gone."""
    by_look: dict[tuple[str, float], dict[str, float]] = {}
    for name, by_replica in (context.raw_metrics or {}).items():
        for replica, series in by_replica.items():
            for point in series:
                key = (replica.unique_id, point.timestamp)
                by_look.setdefault(key, {})[name] = point.value
    for (router_id, at_s), values in by_look.items():
        if (report := ScalingReport.from_stats(values)) is not None:
            yield Look(router_id=router_id, at_s=at_s, report=report)


_planners: dict[str, tuple[Mapping[str, Any], Planner]] = {}
"""By application. Serve makes each deployment's policy by itself and tells it of that deployment
only; in the controller's process this is the one place where they can meet."""


def planner_of(application: str, settings: Mapping[str, Any]) -> Planner:
    """The planner that the policies of an application share; a new one where its settings changed.

    Raises:
        ClusterInternalsChanged: Serve is not the version that this was written for.
    """
    known = _planners.get(application)
    if known is not None and known[0] == settings:
        return known[1]
    check_internals()
    parsed = settings_from(settings)
    planner = Planner(
        parsed,
        interval_s=settings["interval_s"],
        metrics=ScaleMetrics(application, share_wanted=parsed.targets.share),
    )
    _planners[application] = (settings, planner)
    return planner
