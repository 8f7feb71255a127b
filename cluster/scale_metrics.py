"""The scaling plans as Ray metrics. Owns the gauges and counters of one application's planner.

They appear on the metrics port of the node that Serve's controller runs on, with the prefix `ray_`.
"""

from ray.util.metrics import Counter, Gauge

from cluster.scaling import PoolPlan


class ScaleMetrics:
    """Counts decisions and shows the last one of each pool."""

    def __init__(self, application: str, *, share_wanted: float) -> None:
        self._own = {"application": application}
        self._share = share_wanted
        keys = ("application", "pool")
        self._target = Gauge(
            "pdserve_scale_target", "Replicas that scaling decided on.", tag_keys=keys
        )
        self._needed = Gauge(
            "pdserve_scale_needed", "Replicas that the traffic needs.", tag_keys=keys
        )
        self._input = Gauge(
            "pdserve_scale_input", "The inputs of the last plan, by name.", tag_keys=(*keys, "name")
        )
        self._share_wanted = Gauge(
            "pdserve_scale_share_wanted",
            "Share of requests that must meet each target.",
            tag_keys=("application",),
        )
        self._decisions = Counter(
            "pdserve_scale_decisions",
            "Plans, by whether they change the pool, their reason, and what holds them back.",
            tag_keys=(*keys, "change", "reason", "held_by"),
        )

    def observe(self, pool: str, plan: PoolPlan, *, is_change: bool) -> None:
        own = self._own | {"pool": pool}
        self._target.set(plan.target, tags=own)
        self._needed.set(plan.needed, tags=own)
        for name, value in plan.inputs:
            self._input.set(value, tags=own | {"name": name})
        self._share_wanted.set(self._share, tags=self._own)
        change = "yes" if is_change else "no"
        tags = own | {"change": change, "reason": plan.reason, "held_by": plan.held_by or ""}
        self._decisions.inc(tags=tags)
