"""An engine's first requests, made by its own replica: ready means that it has answered.

What breaks at first use (an instruction that the processor lacks, a kernel that is compiled when it
is needed) so breaks while the replica starts, and not with somebody's request. Owns these requests.
"""

import logging
import time
import uuid
from typing import Any

from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreRequest, FinishReason

from engine.errors import EngineUnusable

logger = logging.getLogger(__name__)

NUM_TOKENS = 2
"""Of each answer: one that prefill samples, one of a decode step."""


async def probe(core: Any, config: VllmConfig) -> None:
    """Has an engine that nobody uses yet answer, and returns when it has.

    However long that takes: what it waits for may be compiling.

    Raises:
        EngineDeadError: it ended.
        EngineUnusable: it refused.
    """
    start_s = time.monotonic()
    pending = {request.request_id: request for request in _requests(config)}
    for request in pending.values():
        await core.add_request_async(request)
    while pending:
        for output in (await core.get_output_async()).outputs:
            if not output.finished:
                continue
            if output.finish_reason is not FinishReason.LENGTH:
                raise EngineUnusable(f"its first answer ended with {output.finish_reason}")
            pending.pop(output.request_id, None)
    logger.info("the engine has answered, after %.1f s", time.monotonic() - start_s)


def _requests(config: VllmConfig) -> tuple[EngineCoreRequest, ...]:
    """A whole block of the KV cache and one token more, greedy and with all that is sampled by."""
    sampled = {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "seed": 1, "repetition_penalty": 1.1}
    return tuple(_request(config, **fields) for fields in ({"temperature": 0.0}, sampled))


def _request(config: VllmConfig, **sampling: Any) -> EngineCoreRequest:
    model = config.model_config
    longest = max(1, model.max_model_len - NUM_TOKENS)
    num_tokens = min(config.cache_config.block_size + 1, longest)
    unique = uuid.uuid4().hex
    return EngineCoreRequest(
        request_id=f"probe-{unique}",
        prompt_token_ids=[token % model.get_vocab_size() for token in range(1, num_tokens + 1)],
        mm_features=None,
        sampling_params=SamplingParams(
            max_tokens=NUM_TOKENS,
            ignore_eos=True,
            detokenize=False,
            logprobs=1,
            output_kind=RequestOutputKind.DELTA,
            **sampling,
        ),
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        # Nobody else's prompt begins like this one.
        cache_salt=unique,
        data_parallel_rank=None,
    )
