"""The names inside Ray Serve that scaling relies on, checked before the first plan.

Ray is pinned exactly (pyproject.toml). Whoever moves the pin reads this list first.
"""

import dataclasses

from ray.serve._private.common import ReplicaID, TimeStampedValue
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from cluster.errors import ClusterInternalsChanged

CONTEXT_NAMES = ("raw_metrics",)
CONFIG_FIELDS = (
    "downscale_delay_s",
    "initial_replicas",
    "look_back_period_s",
    "max_replicas",
    "metrics_interval_s",
    "min_replicas",
    "policy",
    "upscale_delay_s",
)


def check_internals() -> None:
    """Raises ClusterInternalsChanged, in one line, where Serve lacks a name that is relied on."""
    missing = [f"AutoscalingContext.{name}" for name in CONTEXT_NAMES
               if not hasattr(AutoscalingContext, name)]  # fmt: skip
    missing += [f"AutoscalingConfig.{name}" for name in CONFIG_FIELDS
                if name not in AutoscalingConfig.model_fields]  # fmt: skip
    points = {field.name for field in dataclasses.fields(TimeStampedValue)}
    missing += [f"TimeStampedValue.{name}" for name in {"timestamp", "value"} - points]
    if "unique_id" not in {field.name for field in dataclasses.fields(ReplicaID)}:
        missing.append("ReplicaID.unique_id")
    if missing:
        raise ClusterInternalsChanged(
            f"Ray Serve has no {', '.join(missing)}: see the pinned versions in pyproject.toml"
        )
