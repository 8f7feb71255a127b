"""The server of the decode pool's replicas."""

from vllm.v1.metrics.stats import SchedulerStats

from decode.failing_reads import MOST_IN_A_ROW, FailingReads
from engine.deployment import EngineSettings
from engine.server import EngineServer
from kvtransfer.stats import pair_deltas


class DecodeServer(EngineServer):
    """A replica that decodes. The engine's connector does the pulling; routers are told how long
    that takes, and where it fails again and again."""

    phase = "decode"

    def __init__(self, settings: EngineSettings) -> None:
        super().__init__(settings)
        self._failing_reads = FailingReads()

    def stats_seen(self, stats: SchedulerStats) -> None:
        super().stats_seen(stats)
        if stats.kv_connector_stats:
            moved = pair_deltas(stats.kv_connector_stats)
            self.replica.add_transfers(moved)
            for engine_id in self._failing_reads.observe(moved):
                self.replica.say_unready(engine_id, f"{MOST_IN_A_ROW} reads in a row have failed")

    def forgotten(self, engine_ids: list[str]) -> None:
        super().forgotten(engine_ids)
        self._failing_reads.forget(engine_ids)
