"""vLLM's pull connector over NIXL, as a cluster of separate prefill and decode engines needs it.

Owns what differs from upstream, on both sides of the connector:

- a decode prompt may be longer than what was prefilled (it carries prefill's first token);
- a prefill that ended for good at its first token keeps nothing for a decode;
- blocks that no decode will ever read are freed when told so, not when the lease ends;
- a decode that is gone before it was scheduled tells its prefill engine so;
- every transfer is counted under the pair of engines it ran between;
- the side channel's port is chosen by the kernel, and NIXL's progress thread does not spin.

Never decides where a request goes. vLLM loads `PdNixlConnector` by name, see `kvtransfer.config`.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlPullConnector
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import (
    NixlPullConnectorScheduler,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
from vllm.v1.request import RequestStatus

from kvtransfer.agent import replace_spinning_agent
from kvtransfer.side_channel import SideChannel
from kvtransfer.stats import PairStats


class PdNixlConnector(NixlPullConnector):  # type: ignore[misc]
    """The two sides' common face; vLLM makes one per role."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        # Past the parent, which would make its own scheduler and worker.
        super(NixlPullConnector, self).__init__(vllm_config, role, kv_cache_config)
        sides = (vllm_config, self.engine_id, kv_cache_config)
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = PdNixlScheduler(*sides)
        else:
            self.connector_worker = PdNixlWorker(*sides)

    def release(self, request_ids: Iterable[str]) -> None:
        """Worker side: free these requests' blocks, nobody will read them."""
        self.connector_worker.release(request_ids)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> PairStats:
        return PairStats() if data is None else PairStats(data=data)


class PdNixlScheduler(NixlPullConnectorScheduler):  # type: ignore[misc]
    """Inside the engine core's scheduler. Owns the side channel."""

    _side_channel: SideChannel | None = None

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        params = request.kv_transfer_params
        if not (params and params.get("do_remote_prefill")):
            matched: tuple[int, bool] = super().get_num_new_matched_tokens(
                request, num_computed_tokens
            )
            return matched
        # Upstream counts the whole prompt; ours may end in a token that prefill never computed.
        num_prefilled = min(params.get("remote_num_tokens", 0), request.num_prompt_tokens)
        num_external = num_prefilled - num_computed_tokens
        return (num_external, True) if num_external > 0 else (0, False)

    def request_finished(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        params = request.kv_transfer_params or {}
        if params.get("do_remote_decode") and request.status == RequestStatus.FINISHED_STOPPED:
            # The answer ended at its first token: there is nothing to hand off.
            self._reqs_not_processed.add(request.request_id)
            self._reqs_need_save.pop(request.request_id, None)
            return False, None
        never_scheduled = bool(params.get("do_remote_prefill"))
        result: tuple[bool, dict[str, Any] | None] = super().request_finished(request, block_ids)
        if not never_scheduled:
            return result
        # Upstream has just asked its worker to notify prefill, without waiting for it. With a
        # handshake still to do the engine would go idle first and the notification with it. As a
        # receive of no blocks that is waited for, it keeps the engine stepping until it is sent.
        no_blocks: tuple[list[int], ...] = tuple([] for _ in self.kv_cache_config.transfer_groups)
        self._reqs_need_recv[request.request_id] = (request, no_blocks, (0,) * len(no_blocks), True)
        return True, None

    def set_xfer_handshake_metadata(self, metadata: Mapping[tuple[int, int], Any]) -> None:
        payloads = {rank: msgspec.msgpack.encode(payload) for rank, payload in metadata.items()}
        self._side_channel = SideChannel(self.side_channel_host, payloads)
        # Read again for the params of every handoff.
        self.side_channel_port = self._side_channel.port

    def shutdown(self) -> None:
        if self._side_channel is not None:
            self._side_channel.stop()
        super().shutdown()


class PdNixlWorker(NixlPullConnectorWorker):  # type: ignore[misc]
    """Beside the model. Owns the NIXL agent and the released requests not yet reported as sent."""

    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        cores = os.sched_getaffinity(0)
        super().__init__(vllm_config, engine_id, kv_cache_config)
        # On CPU upstream has pinned this thread, the model's, to the last core of each NUMA node:
        # the same one for every engine of the host.
        os.sched_setaffinity(0, cores)
        replace_spinning_agent(self.nixl_wrapper)
        self.xfer_stats = PairStats()
        self._released: set[str] = set()

    def release(self, request_ids: Iterable[str]) -> None:
        """Free these requests' blocks as if a decode had read them, at the next step."""
        self._released.update(request_ids)

    def _get_new_notifs(self) -> set[str]:
        sent: set[str] = super()._get_new_notifs()
        # A lease starts one step after its request ended; until then a release waits here.
        for request_id in self._released & self._reqs_to_send.keys():
            del self._reqs_to_send[request_id]
            self._reqs_to_process.discard(request_id)
            sent.add(request_id)
        self._released &= self._reqs_to_process
        return sent

    def _pop_done_transfers(self, transfers: dict[str, list[int]]) -> tuple[set[str], set[str]]:
        done: set[str] = set()
        failed: set[str] = set()
        # One request at a time, so that what upstream records is known to be this pair's.
        for request_id, handles in list(transfers.items()):
            rest = {request_id: handles}
            self.xfer_stats.remote_engine_id = self._recving_metadata[request_id].remote.engine_id
            one_done, one_failed = super()._pop_done_transfers(rest)
            done |= one_done
            failed |= one_failed
            if request_id in rest:
                transfers[request_id] = rest[request_id]
            else:
                del transfers[request_id]
        return done, failed

    def _handle_failed_transfer(self, req_id: str, *args: Any, **kwargs: Any) -> bool:
        if (meta := self._recving_metadata.get(req_id)) is not None:
            self.xfer_stats.record_pair_failure(meta.remote.engine_id)
        return bool(super()._handle_failed_transfer(req_id, *args, **kwargs))
