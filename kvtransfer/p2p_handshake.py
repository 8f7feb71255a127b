"""How a decode worker finds its prefill worker and learns whether their KV is laid out alike.

Owns what a worker tells of itself and the question for it. Never opens a group. It travels over
the side channel, whose address is in the params of every handoff.
"""

from dataclasses import dataclass, fields
from typing import Any

import msgspec
import zmq
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata

from kvtransfer.p2p_errors import PairBroken, PairMismatch, PairTimeout
from kvtransfer.p2p_wire import Connection

_QUERY = b"get_meta_msg"


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """All that must be the same on both sides of a pair."""

    wire_version: int
    vllm_version: str
    model: str
    dtype: str
    cache_dtype: str
    block_size: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    bytes_of_a_block: tuple[int, ...]


@dataclass
class WorkerAddress(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """Where a prefill worker waits for decodes, and its layout; no port where none may come."""

    host: str
    port: int | None
    layout: KVLayout


def check_same(ours: KVLayout, theirs: KVLayout) -> None:
    """Raises PairMismatch, naming every field that differs."""
    differences = [
        f"{field.name} is {getattr(theirs, field.name)} in prefill"
        f" and {getattr(ours, field.name)} in decode"
        for field in fields(KVLayout)
        if getattr(theirs, field.name) != getattr(ours, field.name)
    ]
    if differences:
        raise PairMismatch("; ".join(differences))


def ask_address(host: str, port: int, rank: tuple[int, int], *, timeout_s: float) -> WorkerAddress:
    """The (pipeline rank, tensor rank) worker of the engine with this side channel.

    Raises PairBroken where nobody listens, PairTimeout, or PairMismatch for another connector.
    """
    # ZMQ would try again and again at a port that refuses.
    Connection.open(host, port, timeout_s).close()
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.IPV6, ":" in host)
        sock.setsockopt(zmq.RCVTIMEO, int(timeout_s * 1000))
        sock.connect(f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}")
        sock.send_multipart([b"", msgspec.msgpack.encode((_QUERY, *rank))])
        try:
            _, payload, *_ = sock.recv_multipart()
        except zmq.Again as error:
            raise PairTimeout(f"the side channel at {host}:{port} does not answer") from error
    return _decode(payload)


def _decode(payload: bytes) -> WorkerAddress:
    try:
        address: Any = msgspec.msgpack.decode(payload, type=WorkerAddress)
    except msgspec.DecodeError as error:
        raise PairMismatch("prefill uses another connector") from error
    if address.port is None:
        raise PairBroken("that engine does not prefill")
    decoded: WorkerAddress = address
    return decoded
