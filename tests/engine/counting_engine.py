"""vLLM's own scheduler with our parts, without an engine: a model that counts answers it.

Driven as vLLM's engine core drives it, in all the ways in which that does: one step after the
other, as on CPUs, and with the next step scheduled before the last is done, as on GPUs; for the
first model runner and for the second.
"""

import os
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from fake_runner import FakeRunner, Pass, token_at
from vllm import SamplingParams
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.sampling_params import StructuredOutputsParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from engine.arguments import engine_args
from engine.models import resolve_model
from engine.output_tokens import with_output_tokens
from engine.resume import use_resuming_scheduler
from engine.step_limit import STEP_LIMIT
from engine.steps import StepSample, step_sample

__all__ = ["BLOCK_SIZE", "CUDA", "EOS", "MODES", "CountingEngine", "Mode", "token_at"]

BLOCK_SIZE = 32
EOS = 1
"""Of the demo model, whose tokenizer the grammars know."""


@dataclass(frozen=True)
class Mode:
    """How an engine core drives its scheduler, and whose model runner it speaks to."""

    is_async: bool = False
    is_v2: bool = False

    def __str__(self) -> str:
        return f"{'async' if self.is_async else 'sync'}-v{1 + self.is_v2}"


CUDA = Mode(is_async=True, is_v2=True)
"""What vLLM chooses on GPUs."""
MODES = [
    pytest.param(Mode(is_async=is_async, is_v2=is_v2), id=str(Mode(is_async, is_v2)))
    for is_async in (False, True)
    for is_v2 in (False, True)
]


class CountingEngine:
    """A scheduler and what a model runner would answer. Owns the tokens that came out."""

    def __init__(
        self,
        num_blocks: int,
        *,
        mode: Mode = Mode(),
        num_mtp_modules: int | None = None,
        **options: Any,
    ) -> None:
        """`num_mtp_modules` turns the drafts of `speculative_config` into those of a model."""
        defaults = {
            "max_model_len": 256,
            "block_size": BLOCK_SIZE,
            "max_num_batched_tokens": 256,
            "enable_prefix_caching": False,
            "dtype": "float32",
        }
        self.config = engine_args(resolve_model("demo"), defaults | options).create_engine_config()
        self.config.cache_config.num_gpu_blocks = num_blocks
        if num_mtp_modules is not None:
            modules = SimpleNamespace(num_nextn_predict_layers=num_mtp_modules)
            self.config.speculative_config.method = "mtp"
            self.config.speculative_config.draft_model_config = SimpleNamespace(hf_config=modules)
        self.num_blocks = num_blocks
        # On a CPU vLLM turns it off, whatever it is told.
        self.config.scheduler_config.async_scheduling = mode.is_async
        use_resuming_scheduler(self.config)
        with mock.patch.dict(os.environ, VLLM_USE_V2_MODEL_RUNNER=str(int(mode.is_v2))):
            self.scheduler = _scheduler(self.config, num_blocks)
            self._queue_size = self.config.max_concurrent_batches
        assert self.scheduler.use_v2_model_runner == mode.is_v2
        assert self._queue_size == 1 + mode.is_async
        self._is_async = mode.is_async
        self._checks_drafts = bool(self.config.num_speculative_tokens)
        init_none_hash(sha256)
        self._block_hasher = (
            get_request_block_hasher(BLOCK_SIZE, sha256)
            if self.config.cache_config.enable_prefix_caching
            else None
        )
        self.runner = FakeRunner(
            is_v2=mode.is_v2,
            block_size=BLOCK_SIZE,
            num_drafts=self.config.num_speculative_tokens,
        )
        self.tokens: dict[str, list[int]] = {}
        self.ended: list[str] = []
        self.last: dict[str, EngineCoreOutput] = {}
        """Of the requests that have ended."""
        self.samples: list[StepSample] = []
        self._under_way: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self._aborts: list[str] = []

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
        prompt: list[int] | None = None,
        kv: dict[str, Any] | None = None,
        **sampling: Any,
    ) -> Request:
        extra_args = {STEP_LIMIT: limit_s, "kv_transfer_params": kv}
        params = SamplingParams(
            max_tokens=num_more + len(given),
            extra_args={key: value for key, value in extra_args.items() if value is not None},
            **({"temperature": 0.0, "ignore_eos": True} | sampling),
        )
        if not params.ignore_eos:
            params._eos_token_id = EOS
        if params.structured_outputs is not None:
            params.structured_outputs._backend = "xgrammar"
        request = Request(
            request_id=request_id,
            prompt_token_ids=prompt or [7] * num_tokens,
            sampling_params=with_output_tokens(params, given),
            pooling_params=None,
            arrival_time=arrival_time,
            priority=priority,
            block_hasher=self._block_hasher,
        )
        self.tokens[request_id] = []
        self.scheduler.structured_output_manager.grammar_init(request)
        self.scheduler.add_request(request)
        return request

    def constrained(
        self, request_id: str, num_tokens: int, num_more: int, regex: str, **how: Any
    ) -> Request:
        """The same for an answer that must match; what it has of tokens in `given` must too."""
        constraint = StructuredOutputsParams(regex=regex)
        request = self.add(
            request_id,
            num_tokens,
            num_more,
            structured_outputs=constraint,
            ignore_eos=False,
            **how,
        )
        structured = request.structured_output_request
        assert structured is not None
        while structured.grammar is None:  # it is compiled in a thread
            time.sleep(0.001)
        return request

    @property
    def tokenizer(self) -> Any:
        return self.scheduler.structured_output_manager.tokenizer

    def text(self, tokens: Iterable[int]) -> str:
        """Of these tokens but the end of the answer."""
        text: str = self.tokenizer.decode([token for token in tokens if token != EOS])
        return text

    def abort(self, *request_ids: str) -> None:
        """While a step is under way: it takes effect once that is done."""
        self._aborts += request_ids

    # As the engine core does it (vllm.v1.engine.core).

    def run(self, max_steps: int = 200) -> None:
        """Steps until nothing is left to do."""
        for _ in range(max_steps):
            if not self.has_work:
                return
            self.step_as_engine_core()
        raise AssertionError(f"only {self.ended} have ended")

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_requests() or bool(self._under_way)

    @property
    def num_under_way(self) -> int:
        return len(self._under_way)

    def step_as_engine_core(self) -> None:
        if self._queue_size == 1:
            self.step()
            return
        deferred: Pass | None = None
        if self.scheduler.has_requests():
            scheduled = self.scheduler.schedule()
            computed = self.runner.execute(scheduled)
            num_tokens = scheduled.total_num_scheduled_tokens
            if num_tokens and scheduled.pending_structured_output_tokens:
                deferred = computed
            else:
                self._sample(computed)
                has_room = len(self._under_way) < self._queue_size
                if has_room and (num_tokens or self.scheduler.has_requests()):
                    return
        self.end()
        if deferred is not None:
            if self._checks_drafts:
                self.scheduler.update_draft_token_ids_in_output(
                    self.runner.take_drafts(), deferred.scheduled
                )
            self._sample(deferred)

    # A step in its parts.

    def step(self) -> dict[str, int]:
        """How many tokens of each request the step computed."""
        computed = self.begin()
        self.end()
        return computed

    def begin(self) -> dict[str, int]:
        """Puts a step under way: how many tokens of each request it computes."""
        scheduled = self.scheduler.schedule()
        self._sample(self.runner.execute(scheduled))
        return dict(scheduled.num_scheduled_tokens)

    def end(self) -> None:
        """The oldest step under way is done."""
        scheduled, computed = self._under_way.popleft()
        if self._aborts:
            status = RequestStatus.FINISHED_ABORTED
            aborted = self.scheduler.finish_requests(self._aborts, status)
            self.ended += [request.request_id for request in aborted]
            self._aborts = []
        updates = self.scheduler.update_from_output(scheduled, computed)
        for update in updates.values():
            sample = step_sample(update.scheduler_stats) if update.scheduler_stats else None
            if sample is not None and sample not in self.samples[-1:]:
                self.samples.append(sample)
            for output in update.outputs:
                self.tokens[output.request_id] += output.new_token_ids
                if output.finished:
                    self.ended.append(output.request_id)
                    self.last[output.request_id] = output
        if self._checks_drafts and not self._is_async and scheduled.num_scheduled_tokens:
            self.scheduler.update_draft_token_ids(self.runner.take_drafts())

    def _sample(self, computed: Pass) -> None:
        grammar = self.scheduler.get_grammar_bitmask(computed.scheduled)
        self._under_way.append((computed.scheduled, self.runner.sample(computed, grammar)))

    # What must hold in the end.

    def check_settled(self, *, kept: Iterable[str] = ()) -> None:
        """Nothing is left of any request, but for those whose KV is `kept` for another engine."""
        scheduler = self.scheduler
        assert set(scheduler.requests) == set(kept)
        for queue in ("running", "waiting", "kv_holding_waiting", "deferred_waiting"):
            assert not getattr(scheduler, queue), queue
        for notes in ("finished_recving_kv_req_ids", "failed_recving_kv_req_ids"):
            assert not getattr(scheduler, notes), notes
        for notes in ("deferred_frees", "grammar_compile_error_reqs"):
            assert not getattr(scheduler, notes), notes
        assert set(self.ended) == set(self.tokens)
        assert len(self.ended) == len(self.tokens)
        if not kept:
            pool = scheduler.kv_cache_manager.block_pool
            assert pool.get_num_free_blocks() == self.num_blocks - 1  # one is vLLM's own


def _scheduler(config: VllmConfig, num_blocks: int) -> Any:
    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32
    )
    with set_current_vllm_config(config):
        return config.scheduler_config.get_scheduler_cls()(
            config,
            KVCacheConfig(
                num_blocks=num_blocks,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
            ),
            StructuredOutputManager(config),
            block_size=BLOCK_SIZE,
            log_stats=True,
        )
