"""vLLM's own scheduler with our parts, without an engine: a model that counts answers it."""

from collections import deque
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import set_current_vllm_config
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from engine.arguments import engine_args
from engine.models import resolve_model
from engine.output_tokens import with_output_tokens
from engine.resume import ResumingAsyncScheduler, ResumingScheduler
from engine.step_limit import STEP_LIMIT

BLOCK_SIZE = 32


def token_at(position: int) -> int:
    """What the model says after so many tokens, whatever they are."""
    return 100 + position


class CountingEngine:
    """A scheduler and what a model runner would answer. Owns the tokens that came out."""

    def __init__(self, num_blocks: int, **options: Any) -> None:
        defaults = {
            "max_model_len": 256,
            "block_size": BLOCK_SIZE,
            "max_num_batched_tokens": 256,
            "enable_prefix_caching": False,
            "async_scheduling": False,
            "dtype": "float32",
        }
        config = engine_args(resolve_model("demo"), defaults | options).create_engine_config()
        config.cache_config.num_gpu_blocks = num_blocks
        spec = FullAttentionSpec(
            block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32
        )
        is_async = config.scheduler_config.async_scheduling
        with set_current_vllm_config(config):
            self.scheduler = (ResumingAsyncScheduler if is_async else ResumingScheduler)(
                config,
                KVCacheConfig(
                    num_blocks=num_blocks,
                    kv_cache_tensors=[],
                    kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
                ),
                StructuredOutputManager(config),
                block_size=BLOCK_SIZE,
                log_stats=False,
            )
        self.tokens: dict[str, list[int]] = {}
        self.ended: list[str] = []
        self._under_way: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()

    def add(
        self,
        request_id: str,
        num_tokens: int,
        num_more: int,
        *,
        given: tuple[int, ...] = (),
        limit_s: float | None = None,
        arrival_time: float = 0.0,
        priority: int = 0,
    ) -> Request:
        params = SamplingParams(
            max_tokens=num_more + len(given),
            temperature=0.0,
            ignore_eos=True,
            extra_args=None if limit_s is None else {STEP_LIMIT: limit_s},
        )
        request = Request(
            request_id=request_id,
            prompt_token_ids=[7] * num_tokens,
            sampling_params=with_output_tokens(params, given),
            pooling_params=None,
            arrival_time=arrival_time,
            priority=priority,
        )
        self.tokens[request_id] = []
        self.scheduler.add_request(request)
        return request

    def run(self) -> None:
        """Steps until all have ended."""
        for _ in range(100):
            if len(self.ended) == len(self.tokens):
                return
            self.step()
        raise AssertionError(f"only {self.ended} have ended")

    def step(self) -> dict[str, int]:
        """How many tokens of each request the step computed."""
        computed = self.begin()
        self.end()
        return computed

    def begin(self) -> dict[str, int]:
        """Puts a step under way: how many tokens of each request it computes."""
        scheduled = self.scheduler.schedule()
        self._under_way.append((scheduled, self._answer(scheduled)))
        return dict(scheduled.num_scheduled_tokens)

    def end(self) -> None:
        """The oldest step under way is done."""
        scheduled, computed = self._under_way.popleft()
        updates = self.scheduler.update_from_output(scheduled, computed)
        for update in updates.values():
            for output in update.outputs:
                self.tokens[output.request_id] += output.new_token_ids
                if output.finished:
                    self.ended.append(output.request_id)

    def _answer(self, scheduled: SchedulerOutput) -> ModelRunnerOutput:
        ids = list(scheduled.num_scheduled_tokens)
        requests = [self.scheduler.requests[each] for each in ids]
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={each: index for index, each in enumerate(ids)},
            sampled_token_ids=[
                [] if each.is_prefill_chunk else [token_at(each.num_computed_tokens)]
                for each in requests
            ],
        )
