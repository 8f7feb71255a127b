"""How many replicas each pool should have: one pure plan for both, with its reasons.

    snapshot = ScaleSnapshot(now_s=..., traffic=..., load=..., prefill=..., decode=..., ...)
    plan = plan_scale(snapshot, settings, state)     # the first state is ScaleState()
    plan.prefill.target, plan.decode.target, plan.state   # the state goes into the next call

Nothing here reads a clock, draws a random number, or knows Ray: whoever observes and acts is
cluster.autoscaling in production and the simulator elsewhere.
"""

from cluster.scaling.plan import plan_scale
from cluster.scaling.snapshot import (
    Attainment,
    Engines,
    LearnedState,
    Load,
    PoolCounts,
    PoolLimits,
    PoolPlan,
    ScalePlan,
    ScaleSettings,
    ScaleSnapshot,
    ScaleState,
    Targets,
    Traffic,
)

__all__ = [
    "Attainment",
    "Engines",
    "LearnedState",
    "Load",
    "PoolCounts",
    "PoolLimits",
    "PoolPlan",
    "ScalePlan",
    "ScaleSettings",
    "ScaleSnapshot",
    "ScaleState",
    "Targets",
    "Traffic",
    "plan_scale",
]
