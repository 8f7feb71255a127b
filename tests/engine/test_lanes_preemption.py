"""KV runs out under priorities: vLLM's own scheduler with our lanes, and a model that counts."""

import time
from collections.abc import Iterator

import pytest
import torch
from vllm import SamplingParams
from vllm.config import set_current_vllm_config
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from engine.arguments import engine_args
from engine.demo_model import resolve_model
from engine.output_tokens import with_output_tokens
from engine.resume import ResumingScheduler

BLOCK_SIZE = 32
NUM_BLOCKS = 5
"""One of them is vLLM's own: two prompts of two blocks fit, and not a token more."""
PROMPT_TOKENS = 2 * BLOCK_SIZE - 2
NUM_MORE = 8


def token_at(position: int) -> int:
    """What the model says after so many tokens, whatever they are."""
    return 100 + position


class CountingEngine:
    """A scheduler and what a model runner would answer. Owns the tokens that came out."""

    def __init__(self) -> None:
        options = {
            "max_model_len": 256,
            "block_size": BLOCK_SIZE,
            "max_num_batched_tokens": 256,
            "scheduling_policy": "priority",
            "enable_prefix_caching": False,
            "async_scheduling": False,
            "dtype": "float32",
        }
        config = engine_args(resolve_model("demo"), options).create_engine_config()
        config.cache_config.num_gpu_blocks = NUM_BLOCKS
        spec = FullAttentionSpec(
            block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32
        )
        with set_current_vllm_config(config):
            self.scheduler = ResumingScheduler(
                config,
                KVCacheConfig(
                    num_blocks=NUM_BLOCKS,
                    kv_cache_tensors=[],
                    kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
                ),
                StructuredOutputManager(config),
                block_size=BLOCK_SIZE,
                log_stats=False,
            )
        self.tokens: dict[str, list[int]] = {}
        self.ended: list[str] = []

    def add(
        self,
        request_id: str,
        priority: int,
        *,
        given: tuple[int, ...] = (),
        arrival_s: float | None = None,
    ) -> Request:
        params = SamplingParams(max_tokens=NUM_MORE + len(given), temperature=0.0, ignore_eos=True)
        request = Request(
            request_id=request_id,
            prompt_token_ids=[7] * PROMPT_TOKENS,
            sampling_params=with_output_tokens(params, given),
            pooling_params=None,
            arrival_time=float(len(self.tokens)) if arrival_s is None else arrival_s,
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
            self._step()
        raise AssertionError(f"only {self.ended} have ended")

    def _step(self) -> None:
        scheduled = self.scheduler.schedule()
        updates = self.scheduler.update_from_output(scheduled, self._answer(scheduled))
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
                [token_at(each.num_tokens)] if each.num_computed_tokens >= each.num_tokens else []
                for each in requests
            ],
        )


@pytest.fixture
def engine() -> Iterator[CountingEngine]:
    engine = CountingEngine()
    yield engine
    engine.scheduler.shutdown()


def expected(num_given: int = 0) -> list[int]:
    start = PROMPT_TOKENS + num_given
    return [token_at(position) for position in range(start, start + NUM_MORE)]


@pytest.mark.parametrize("order", [("urgent", "patient"), ("patient", "urgent")])
def test_the_least_urgent_gives_up_its_kv_whoever_came_first(
    engine: CountingEngine, order: tuple[str, str]
) -> None:
    priorities = {"urgent": 1, "patient": 9}
    requests = {name: engine.add(name, priorities[name]) for name in order}
    engine.run()
    assert engine.ended == ["urgent", "patient"]
    assert requests["urgent"].num_preemptions == 0
    assert requests["patient"].num_preemptions > 0
    assert engine.tokens == {"urgent": expected(), "patient": expected()}


def test_one_that_came_with_tokens_goes_on_exactly_after_it_was_preempted(
    engine: CountingEngine,
) -> None:
    given = (token_at(PROMPT_TOKENS), token_at(PROMPT_TOKENS + 1))
    moved = engine.add("moved", 9, given=given)
    engine.add("urgent", 1)
    engine.run()
    assert moved.num_preemptions > 0
    assert engine.tokens["moved"] == expected(num_given=len(given))


@pytest.mark.parametrize(("waited_s", "first"), [(0.5, "late"), (5.0, "fresh")])
def test_a_prompt_that_is_late_gives_way_to_one_that_is_not(
    engine: CountingEngine, waited_s: float, first: str
) -> None:
    now_s = time.time()
    arrival_s = now_s - waited_s
    engine.add("late", round(1000 * (arrival_s + 3.0)), arrival_s=arrival_s)
    engine.add("fresh", round(1000 * (now_s + 30.0)), arrival_s=now_s)
    engine.run()
    assert engine.ended[0] == first
