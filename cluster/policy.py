"""The autoscaling policies that Ray Serve's controller runs, one object per deployment.

Serve pickles this module's classes by value: what they share must be found through a module that is
imported, where they run. Decides nothing: see cluster.planner.
"""

from typing import Any

from ray.serve.config import AutoscalingContext


class PlannedSize:
    """Has a deployment follow the plan of its application."""

    def __init__(self, **settings: Any) -> None:
        self._settings = settings

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The size that the deployment should have, and no state: the planner keeps its own."""
        from cluster.planner import planner_of

        planner = planner_of(context.app_name, self._settings)
        return planner.observe(context), {}
