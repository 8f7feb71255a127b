"""vLLM's front end with the cluster where its engine would be.

Owns what differs from vLLM's on the way of a request into the core client, and out of it before its
end.
"""

from collections.abc import Iterable
from http import HTTPStatus
from typing import Any
from unittest import mock

from vllm.config import VllmConfig
from vllm.exceptions import GracefulHTTPError, VLLMError, VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.utils import length_from_prompt_token_ids_or_embeds
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.output_processor import RequestOutputCollector
from vllm.v1.executor.abstract import Executor

from router.answers import NOTE
from router.core_client import ClusterCoreClient
from router.errors import SandboxUnavailable
from router.grammar_check import GrammarCheck
from router.loop_validation import check_lengths, count_prompt_logprobs
from router.request import KV_PARAMS


class ClusterLLM(AsyncLLM):  # type: ignore[misc]
    """vLLM's front end over a core client that is given."""

    def __init__(
        self,
        config: VllmConfig,
        core: ClusterCoreClient,
        *,
        client_priority: tuple[int, int],
        max_prompt_logprobs: int,
        grammars: GrammarCheck,
    ) -> None:
        """`client_priority` are the ends of what a client may ask for, `max_prompt_logprobs` is
        for all prompts of one HTTP request."""
        # AsyncLLM makes its engine-core client itself; there is no argument for another one.
        with mock.patch(
            "vllm.v1.engine.async_llm.EngineCoreClient.make_async_mp_client",
            return_value=core,
        ):
            super().__init__(
                vllm_config=config,
                executor_class=Executor.get_class(config),
                log_stats=False,
                log_requests=False,
            )
        self._core = core
        self._least_priority, self._most_priority = client_priority
        self._max_prompt_logprobs = max_prompt_logprobs
        self._grammars = grammars
        # With it, constraints would be compiled in the loop, where they hold everybody up.
        self.input_processor.structured_outputs_config = None

    async def add_request(
        self,
        request_id: str,
        prompt: Any,
        params: Any,
        *args: Any,
        priority: int = 0,
        **options: Any,
    ) -> RequestOutputCollector:
        """Takes a request once its constraint is known to compile, at the nearest priority that a
        client may have."""
        try:
            await self._check(params)
            self._count_prompt_logprobs(prompt, params)
            allowed = min(max(priority, self._least_priority), self._most_priority)
            return await super().add_request(
                request_id, prompt, params, *args, priority=allowed, **options
            )
        except VLLMError as error:
            if (note := NOTE.get()) is not None:
                note.error = error
            raise

    async def _check(self, params: Any) -> None:
        if isinstance(params, SamplingParams):
            check_lengths(params)
            if params.structured_outputs is not None:
                await self._check_grammar(params.structured_outputs)
        # No client decides where KV comes from, and vLLM takes whatever it says for a mapping.
        (getattr(params, "extra_args", None) or {}).pop(KV_PARAMS, None)

    def _count_prompt_logprobs(self, prompt: Any, params: Any) -> None:
        if not isinstance(params, SamplingParams) or params.prompt_logprobs is None:
            return
        num_tokens = length_from_prompt_token_ids_or_embeds(
            prompt.get("prompt_token_ids"), prompt.get("prompt_embeds")
        )
        num = count_prompt_logprobs(params, num_tokens, self.model_config)
        if (note := NOTE.get()) is not None:
            num = note.num_prompt_logprobs = note.num_prompt_logprobs + num
        if num > self._max_prompt_logprobs:
            raise VLLMValidationError(
                f"More than {self._max_prompt_logprobs} log probabilities of its prompts' tokens "
                "are asked for.",
                parameter="prompt_logprobs",
            )

    async def _check_grammar(self, constraint: StructuredOutputsParams) -> None:
        try:
            await self._grammars.apply(constraint)
        except SandboxUnavailable as error:
            raise GracefulHTTPError(str(error), HTTPStatus.SERVICE_UNAVAILABLE) from None

    async def abort(self, request_id: str | Iterable[str], internal: bool = False) -> None:
        """Ends requests that nobody waits for; those that a stop string has ended are not here."""
        request_ids = [request_id] if isinstance(request_id, str) else list(request_id)
        self._core.cancel(self.output_processor.abort_requests(request_ids, internal))
