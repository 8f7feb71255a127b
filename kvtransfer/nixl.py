"""vLLM's pull connector over NIXL, as a cluster of separate prefill and decode engines needs it.

Owns what differs from upstream in the scheduler (`kvtransfer.worker` owns what does beside the
model):

- a decode prompt may be longer than what was prefilled (it carries prefill's first token);
- a prefill that ended for good at its first token keeps nothing for a decode;
- what is kept for a decode has a lease, whose id goes to the worker and to the decode;
- a decode that is gone before it was scheduled tells its prefill engine so;
- the side channel's port is chosen by the kernel.

Never decides where a request goes. vLLM loads `PdNixlConnector` by name, see `kvtransfer.config`.
"""

import secrets
from collections.abc import Iterable, Mapping
from itertools import count
from types import SimpleNamespace
from typing import Any

import msgspec
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlPullConnector
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import (
    NixlPullConnectorScheduler,
)
from vllm.v1.request import RequestStatus

from kvtransfer.credentials import credentials_of
from kvtransfer.side_channel import SideChannel
from kvtransfer.stats import PairStats
from kvtransfer.tls import new_tls
from kvtransfer.worker import LeasedMetadata, PdNixlWorker

LEASE_ID = "remote_lease_id"
"""In `kv_transfer_params`: what decode must find in prefill's table once it has read the blocks."""


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

    def warm_up(
        self, engine_id: str, host: str, port: int, tp_size: int
    ) -> tuple[bool, str | None]:
        """Worker side: get ready to read a prefill engine; see `PdNixlWorker.warm_up`."""
        result: tuple[bool, str | None] = self.connector_worker.warm_up(
            engine_id, host, port, tp_size
        )
        return result

    def forget(self, engine_id: str) -> None:
        """Worker side: that prefill engine is gone."""
        self.connector_worker.forget(engine_id)

    def num_dropped_tokens(self) -> int:
        return num_dropped_tokens(self._vllm_config, self.kv_cache_config)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> PairStats:
        return PairStats() if data is None else PairStats(data=data)


def num_dropped_tokens(vllm_config: Any, kv_cache_config: Any) -> int:
    """How many tokens at the end of a prompt prefill does not read where it hands the prompt over.

    Decode reads them: there recurrent state goes on, and drafts begin, exactly. What prefill
    samples before them is not the prompt's next token. A prompt of so many tokens or fewer is read
    whole.
    """
    # By upstream's own rule, which its scheduler follows in another process.
    asked = SimpleNamespace(
        vllm_config=vllm_config,
        _has_mamba=kv_cache_config.has_mamba_layers,
        _bounded_replay=any(
            group.kv_cache_spec.prefix_replay_tokens > 0
            for group in kv_cache_config.kv_cache_groups
        ),
    )
    return int(NixlPullConnectorScheduler._prefill_backoff(asked))


class PdNixlScheduler(NixlPullConnectorScheduler):  # type: ignore[misc]
    """Inside the engine core's scheduler. Owns the side channel and the numbering of leases."""

    _side_channel: SideChannel | None = None

    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        # From anywhere, so that no two engines, nor two lives of one, grant the same.
        self._next_lease_id = count(secrets.randbits(60) + 1)
        self._lease_ids: dict[str, int] = {}
        self._new_lease_ids: dict[str, int] = {}

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
        num_prefilled = min(params.get("remote_num_tokens", 0), request.num_tokens)
        num_external = num_prefilled - num_computed_tokens
        return (num_external, True) if num_external > 0 else (0, False)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        params = request.kv_transfer_params or {}
        if params.get("do_remote_decode") and request.request_id not in self._lease_ids:
            lease_id = next(self._next_lease_id)
            self._lease_ids[request.request_id] = lease_id
            self._new_lease_ids[request.request_id] = lease_id

    def build_connector_meta(self, scheduler_output: Any) -> LeasedMetadata:
        remote_lease_ids = {
            request_id: request.kv_transfer_params.get(LEASE_ID)
            for request_id, (request, *_) in self._reqs_need_recv.items()
        }
        meta = LeasedMetadata(super().build_connector_meta(scheduler_output))
        meta.remote_lease_ids = remote_lease_ids
        # With its first step: the worker has granted a lease before its request can end.
        meta.granted_lease_ids, self._new_lease_ids = self._new_lease_ids, {}
        return meta

    def request_finished(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        lease_id = self._lease_ids.pop(request.request_id, None)
        keeps_blocks, handed_over = self._finish(request, block_ids)
        if handed_over is not None:
            handed_over[LEASE_ID] = lease_id
        return keeps_blocks, handed_over

    def _finish(
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
        reserved_port = self.vllm_config.kv_transfer_config.get_from_extra_config(
            "side_channel_port", None
        )
        credentials = credentials_of(self.vllm_config)
        self._side_channel = SideChannel(
            self.side_channel_host,
            payloads,
            reserved_port,
            engine_id=self.engine_id,
            secret=credentials.secret,
            tls=new_tls(credentials.tls),
        )
        # Read again for the params of every handoff.
        self.side_channel_port = self._side_channel.port

    def shutdown(self) -> None:
        if self._side_channel is not None:
            self._side_channel.stop()
        super().shutdown()
