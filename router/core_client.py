"""The cluster's face towards vLLM's front end: an engine-core client over two pools.

vLLM's AsyncLLM adds requests here and reads token outputs here, as it would from one engine. An
adapter: what becomes of a request is the business of `router.lifecycle` and `router.failover`.
"""

import asyncio
from collections.abc import Iterable

from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.core_client import EngineCoreClient

from engine.output_tokens import OUTPUT_TOKENS
from engine.step_limit import STEP_LIMIT
from router.core import RouterCore
from router.engine_requests import KV_PARAMS
from router.lifecycle import last_output
from router.route_note import NOTE


class _Resources:
    """The part of an engine's resources that AsyncLLM asks about: replicas die, the cluster not."""

    engine_dead = False


class ClusterCoreClient(EngineCoreClient):  # type: ignore[misc]
    """Requests in, token outputs out, across the prefill and decode pools."""

    resources = _Resources()
    engine_ranks_managed = (0,)

    def __init__(self, core: RouterCore) -> None:
        self._core = core

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return ("generate",)

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Sends a request on its way."""
        try:
            # The choices of one HTTP request come one after the other: each lets others run.
            await asyncio.sleep(0)
            _drop_what_is_ours(request)
            state = self._core.lifecycle.add(request, NOTE.get())
            if state.replica is not None:
                # Where much is to be sent, the next one waits until it can be.
                await state.replica.end.drained()
        except BaseException:
            # The front end has it already, and forgets what it added only with a last output.
            self._core.lifecycle.deliver([last_output(request.request_id, FinishReason.ABORT)])
            self.cancel([request.request_id])
            raise

    async def get_output_async(self) -> EngineCoreOutputs:
        return await self._core.outputs.get()

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Ends requests whose answers are complete: a stop string has come, says the front end."""
        self._core.lifecycle.stop(request_ids, FinishReason.STOP)

    def cancel(self, request_ids: Iterable[str]) -> None:
        """Ends requests whose answers nobody waits for any more."""
        self._core.lifecycle.stop(request_ids, FinishReason.ABORT)

    def get_kv_event_sources(self) -> dict[int, object]:
        return {}

    def dp_engines_running(self) -> bool:
        return bool(self._core.lifecycle.requests)

    def shutdown(self, timeout: float | None = None) -> None:
        self._core.close("the router was stopped")


def _drop_what_is_ours(request: EngineCoreRequest) -> None:
    """Where KV and tokens come from, and in which pieces and where, no client decides."""
    params = request.sampling_params
    assert params is not None, "only generation is served"
    for ours in (KV_PARAMS, OUTPUT_TOKENS, STEP_LIMIT):
        (params.extra_args or {}).pop(ours, None)
    request.data_parallel_rank = None
