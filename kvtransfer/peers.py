"""Making a pair of engines ready before its first request, and parting it when one is gone.

Owns the way from an engine core's client to the connector beside the model. Never decides which
engines make a pair.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

_POLL_S = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class KVPeer:
    """A prefill engine, as a decode engine finds it."""

    engine_id: str
    host: str
    port: int
    """Of its side channel."""
    tp_size: int


async def warm_up(core: Any, peer: KVPeer, *, timeout_s: float = 15.0) -> str | None:
    """Does all that the pair's first transfer would do, except the transfer.

    `core` is the decode engine's vLLM `AsyncMPClient`. Returns None when the pair is ready and else
    what keeps it apart, in one line: nobody there, another engine, another layout of the KV, no
    answer in time. An engine in the midst of its steps is not held up; a pair that is ready is left
    as it is. Takes tens of milliseconds, and seconds where the peer does not answer.
    """
    clock = asyncio.get_running_loop().time
    until_s = clock() + timeout_s
    address = (peer.engine_id, peer.host, peer.port, peer.tp_size)
    while True:
        answers = await core.collective_rpc_async("warm_up_kv_peer", args=address)
        problems = [problem for _, problem in answers if problem is not None]
        if all(done for done, _ in answers):
            return problems[0] if problems else None
        if clock() >= until_s:
            return f"the KV of engine {peer.engine_id} was not ready after {timeout_s:g} s"
        await asyncio.sleep(_POLL_S)


async def forget(core: Any, engine_id: str) -> None:
    """Drops what a decode engine keeps of a prefill engine that is gone; it need not know it.

    What is still being read of it ends as it can; new reads fail at once, and are computed.
    """
    await core.collective_rpc_async("forget_kv_peer", args=(engine_id,))
