"""Our metrics on both roads: Prometheus text in this process, and Ray's own metrics.

Each process keeps one prometheus_client registry; `export_to_ray` copies its samples into Ray's
metrics every few seconds, so that they appear on each node's Ray metrics port under the prefix
`ray_`, and from there in Prometheus and Grafana. Owns no metric itself.
"""

import asyncio
import logging

from prometheus_client import CollectorRegistry
from ray.util.metrics import Gauge

logger = logging.getLogger(__name__)

EXPORT_INTERVAL_S = 5.0
PREFIX = "pdserve_"


BY_REPLICA = "pdserve_replica_"
"""How names begin of what a router says of each replica. Ray gets it of each replica itself: it
keeps what it was told of one for as long as the process lives that told it, kilobytes for each
series, and a router lives longer than replicas."""


class RayExporter:
    """Copies samples into Ray. Owns the Ray gauges, one per sample name.

    Every sample is a gauge to Ray, histogram buckets and counters too: Prometheus' functions
    (`rate`, `histogram_quantile`) look at the series, not at the declared type.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._gauges: dict[str, Gauge] = {}

    def export_once(self) -> None:
        for family in self._registry.collect():
            if not family.name.startswith(PREFIX) or family.name.startswith(BY_REPLICA):
                continue
            for sample in family.samples:
                if sample.name.endswith("_created"):
                    continue
                gauge = self._gauges.get(sample.name)
                if gauge is None:
                    gauge = Gauge(
                        sample.name, description=family.documentation, tag_keys=tuple(sample.labels)
                    )
                    self._gauges[sample.name] = gauge
                gauge.set(sample.value, tags=dict(sample.labels))

    async def run(self) -> None:
        """Exports for ever; cancel to end."""
        while True:
            await asyncio.sleep(EXPORT_INTERVAL_S)
            try:
                self.export_once()
            except Exception:
                # Whatever Ray did not take now, it may take the next time.
                logger.exception("metrics were not exported")
