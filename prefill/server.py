"""The server of the prefill pool's replicas."""

import asyncio
import logging

from vllm.v1.engine import EngineCoreOutput

from engine.channel import RouterEnd
from engine.deployment import EngineSettings
from engine.server import EngineServer
from kvtransfer.release import release

logger = logging.getLogger(__name__)


class PrefillServer(EngineServer):
    """A replica that prefills. Owns the list of handed-over requests, by router, for their lease.

    Blocks that a decode replica will never pull are freed at once: when the router says so, when
    the router is gone, or when the request was aborted while its last step ran.
    """

    phase = "prefill"

    def __init__(self, settings: EngineSettings) -> None:
        super().__init__(settings)
        self._handed_over: dict[str, RouterEnd] = {}
        self._releases: set[asyncio.Task[None]] = set()

    @property
    def is_busy(self) -> bool:
        # Blocks that were handed over are in use until decode has pulled them.
        handed_over = bool(self._handed_over) and self.replica.kv_usage_fraction > 0
        return super().is_busy or handed_over

    def output_sent(self, router: RouterEnd, output: EngineCoreOutput) -> None:
        if output.kv_transfer_params is None:
            return
        request_id = output.request_id
        self._handed_over[request_id] = router
        # After the lease the engine has freed the blocks itself.
        loop = asyncio.get_running_loop()
        loop.call_later(self.settings.lease_s, self._handed_over.pop, request_id, None)

    def num_kept(self) -> int:
        return len(self._handed_over)

    def output_orphaned(self, output: EngineCoreOutput) -> None:
        if output.kv_transfer_params is not None:
            self._release([output.request_id])

    def released(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._handed_over.pop(request_id, None)
        self._release(request_ids)

    def router_gone(self, router: RouterEnd) -> None:
        self.released([key for key, owner in self._handed_over.items() if owner is router])

    def _release(self, request_ids: list[str]) -> None:
        if not request_ids:
            return
        task = asyncio.create_task(release(self.host.core, request_ids))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)
