"""Releasing what a prefill engine holds for a decode that will never come.

Owns the way from an engine core's client to the connector beside the model. Never decides that a
decode will not come.
"""

from collections.abc import Sequence
from typing import Any


async def release(core: Any, request_ids: Sequence[str]) -> None:
    """End these requests on a prefill engine in whatever state they are, and free their blocks.

    `core` is vLLM's `AsyncMPClient` of an engine whose `worker_extension_cls` is one of
    `kvtransfer.extension`. A request that still runs is aborted; one that waits to be
    read is let go; one that is not there any more is no error. Returns when the engine has been
    told; the blocks are back one step later.

    Prefill cannot see a read that has begun: release a request only while no decode engine has it.
    Once one has, abort it there, and that engine releases prefill when it has stopped reading.
    """
    ids = list(request_ids)
    await core.abort_requests_async(ids)
    await core.collective_rpc_async("release_kv_blocks", args=(ids,))
