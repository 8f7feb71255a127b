"""What an engine tells a peer before the first transfer, and how the peer asks for it.

Owns the payload on the side channel, a superset of vLLM's. Never loads an agent.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
from vllm import __version__ as vllm_version
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import (
    NIXL_CONNECTOR_VERSION,
    NixlHandshakePayload,
)

from kvtransfer.errors import GreetingFailed, PeerMismatch
from kvtransfer.layout import PROTOCOL, KVLayout
from kvtransfer.shared_memory import SharedMemory
from kvtransfer.side_channel import ask
from kvtransfer.tls import Tls


@dataclass
class PdHandshakePayload(NixlHandshakePayload):  # type: ignore[misc]
    """One worker's part of its engine."""

    engine_id: str
    layout: KVLayout
    lease_table_address: int
    num_lease_slots: int
    shared_memory: SharedMemory | None


def layout_of(worker: Any) -> KVLayout:
    """How a worker of vLLM's NIXL connector keeps its KV."""
    config = worker.vllm_config
    model = config.model_config
    return KVLayout(
        protocol=PROTOCOL,
        vllm_version=vllm_version,
        connector_version=NIXL_CONNECTOR_VERSION,
        transfer_mode=worker._TRANSFER_MODE,
        model=model.model,
        dtype=str(model.dtype),
        kv_cache_dtype=str(config.cache_config.cache_dtype),
        num_layers=model.get_total_num_hidden_layers(),
        num_kv_heads=1 if model.use_mla else model.get_total_num_kv_heads(),
        head_size=model.get_head_size(),
        block_size=config.cache_config.block_size,
        kv_cache_layout=worker.kv_cache_layout,
        attention_backend=worker.backend_name,
        hybrid_kv_cache=not config.scheduler_config.disable_hybrid_kv_cache_manager,
        tensor_parallel_size=worker.transfer_tp_size,
        reads_repeated_heads=model.use_mla or worker._has_mamba,
    )


def fetch_payloads(
    host: str,
    port: int,
    tp_ranks: Iterable[int],
    *,
    engine_id: str,
    secret: str,
    tls: Tls | None = None,
) -> tuple[dict[int, PdHandshakePayload], float]:
    """Asks an engine's side channel for some of its workers: (by rank, its clock minus ours).

    Blocks for a few seconds at most. Raises PeerUnreachable where nobody answers, PeerMismatch
    where it is another engine or not understood.
    """
    try:
        answers = ask(
            host,
            port,
            [(0, rank) for rank in tp_ranks],
            engine_id=engine_id,
            secret=secret,
            tls=tls,
        )
        payloads = {
            rank: msgspec.msgpack.decode(answer.payload, type=PdHandshakePayload)
            for (_, rank), answer in answers.items()
        }
    except GreetingFailed as failure:
        raise PeerMismatch(f"the KV engine at {host}:{port}: {failure}") from None
    except msgspec.DecodeError as error:
        raise PeerMismatch(
            f"the KV engine at {host}:{port} does not speak this version's handshake: {error}"
        ) from None
    # The way to all of them is the same: what took longer was only held up.
    quickest = min(answers.values(), key=lambda answer: answer.round_trip_s)
    return payloads, quickest.clock_offset_s
