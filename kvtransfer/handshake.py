"""What an engine tells a peer before the first transfer, and how the peer asks for it.

Owns the payload on the side channel, a superset of vLLM's: vLLM's own handshake reads the part that
it knows. Never loads an agent.
"""

import contextlib
import socket
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq
from vllm import __version__ as vllm_version
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import (
    GET_META_MSG,
    NIXL_CONNECTOR_VERSION,
    NixlHandshakePayload,
)

from kvtransfer.errors import PeerMismatch, PeerUnreachable
from kvtransfer.layout import PROTOCOL, KVLayout
from kvtransfer.shared_memory import SharedMemory

CONNECT_TIMEOUT_S = 1.0
ANSWER_TIMEOUT_S = 5.0


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


def fetch_payload(host: str, port: int, tp_rank: int) -> PdHandshakePayload:
    """Asks an engine's side channel for one of its workers. Blocks for a few seconds at most.

    Raises PeerUnreachable where nobody answers, PeerMismatch where the answer is not understood.
    """
    # ZMQ goes on trying where nobody listens any more, vLLM's handshake with it: a dead peer would
    # hold up every handshake behind it for five seconds.
    try:
        with contextlib.closing(socket.create_connection((host, port), CONNECT_TIMEOUT_S)):
            pass
    except OSError as error:
        raise PeerUnreachable(f"no KV engine listens at {host}:{port}: {error}") from None
    with zmq.Context() as context, context.socket(zmq.REQ) as asking:
        asking.setsockopt(zmq.LINGER, 0)
        asking.setsockopt(zmq.IPV6, ":" in host)
        asking.setsockopt(zmq.RCVTIMEO, int(ANSWER_TIMEOUT_S * 1000))
        asking.connect(f"tcp://{bracketed(host)}:{port}")
        asking.send(msgspec.msgpack.encode((GET_META_MSG, 0, tp_rank)))
        try:
            payload, _ = asking.recv_multipart()
        except zmq.Again:
            raise PeerUnreachable(
                f"the KV engine at {host}:{port} does not answer for its rank {tp_rank}"
            ) from None
    try:
        return msgspec.msgpack.decode(payload, type=PdHandshakePayload)
    except msgspec.DecodeError as error:
        raise PeerMismatch(
            f"the KV engine at {host}:{port} does not speak this version's handshake: {error}"
        ) from None


def bracketed(host: str) -> str:
    """As hosts are written in front of a port."""
    return f"[{host}]" if ":" in host else host
