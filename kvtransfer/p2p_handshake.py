"""How a decode worker finds its prefill worker and learns whether their KV is laid out alike.

Owns what a worker tells of itself and the question for it. Never opens a group. It travels over
the side channel, whose address is in the params of every handoff.
"""

from dataclasses import dataclass, fields
from typing import Any

import msgspec

from kvtransfer.errors import GreetingFailed, PeerTimeout, PeerUnreachable
from kvtransfer.p2p_errors import PairBroken, PairMismatch, PairTimeout
from kvtransfer.side_channel import Rank, ask
from kvtransfer.tls import Tls


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
class WorkerAddress:
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


def ask_address(
    host: str,
    port: int,
    rank: Rank,
    *,
    engine_id: str,
    secret: str,
    tls: Tls | None = None,
    timeout_s: float,
) -> WorkerAddress:
    """This worker of the engine `engine_id`, which has this side channel.

    Raises PairBroken where nobody or a stranger listens, PairMismatch for another connector.
    """
    try:
        answers = ask(
            host, port, [rank], engine_id=engine_id, secret=secret, tls=tls, timeout_s=timeout_s
        )
    except PeerTimeout as error:
        raise PairTimeout(str(error)) from None
    except (PeerUnreachable, GreetingFailed) as error:
        raise PairBroken(str(error)) from None
    return _decode(answers[rank].payload)


def _decode(payload: bytes) -> WorkerAddress:
    try:
        address: Any = msgspec.msgpack.decode(payload, type=WorkerAddress)
    except msgspec.DecodeError as error:
        raise PairMismatch("prefill uses another connector") from error
    if address.port is None:
        raise PairBroken("that engine does not prefill")
    decoded: WorkerAddress = address
    return decoded
