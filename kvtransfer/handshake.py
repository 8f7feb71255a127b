"""What an engine tells a peer before the first transfer, and how the peer asks for it.

Owns the payload on the side channel, a superset of vLLM's: vLLM's own handshake reads the part that
it knows. Never loads an agent.
"""

import contextlib
import socket
from dataclasses import dataclass

import msgspec
import zmq
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import (
    GET_META_MSG,
    NixlHandshakePayload,
)

from kvtransfer.errors import PeerMismatch, PeerUnreachable
from kvtransfer.layout import KVLayout

CONNECT_TIMEOUT_S = 1.0
ANSWER_TIMEOUT_S = 5.0


@dataclass
class PdHandshakePayload(NixlHandshakePayload):  # type: ignore[misc]
    """One worker's part of its engine."""

    engine_id: str
    layout: KVLayout
    lease_table_address: int
    num_lease_slots: int


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
