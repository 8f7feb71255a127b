"""An answer cut anywhere and continued in a real engine is the answer that was never cut."""

import itertools
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import pytest_asyncio
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

from engine.arguments import engine_args
from engine.host import EngineHost
from engine.models import resolve_model
from engine.output_tokens import with_output_tokens

OPTIONS = {
    "max_model_len": 256,
    "kv_cache_memory_bytes": 2**26,
    "dtype": "float32",
    "block_size": 32,
    # Small enough that a continued answer is read in several steps, as a long one would be.
    "max_num_batched_tokens": 32,
}
pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = [7, 11, 13, 17, 19, 23]
LONG_PROMPT = list(range(5, 105))
NUM_TOKENS = 40
EOS = 2
JSON_SCHEMA = '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'


def grammar(**constraint: Any) -> StructuredOutputsParams:
    params = StructuredOutputsParams(**constraint)
    params._backend = "xgrammar"  # vLLM's front end chooses it
    return params


CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "logprobs": {"temperature": 0.0, "logprobs": 2},
    "seed": {"temperature": 1.0, "seed": 7},
    "seed-top-k-p": {"temperature": 0.8, "seed": 8, "top_k": 20, "top_p": 0.9},
    "presence": {"temperature": 0.0, "presence_penalty": 1.5},
    "frequency": {"temperature": 0.0, "frequency_penalty": 1.5},
    "repetition": {"temperature": 0.0, "repetition_penalty": 1.5},
    "min-tokens": {"temperature": 1.0, "seed": 9, "min_tokens": 30, "stop_token_ids": [5, 6, 7, 8]},
    "json": {"temperature": 1.0, "seed": 10, "structured_outputs": grammar(json=JSON_SCHEMA)},
    "regex": {"temperature": 1.0, "seed": 1, "structured_outputs": grammar(regex="[a-z]{5,20}!")},
}


class Engine:
    """One real engine, asked directly."""

    def __init__(self, host: EngineHost) -> None:
        self._host = host
        self._ids = itertools.count()

    async def ask(
        self,
        params: SamplingParams,
        given: Sequence[int] = (),
        prompt: Sequence[int] = PROMPT,
    ) -> list[EngineCoreOutput]:
        """The outputs of a request that brings the tokens `given`."""
        request = EngineCoreRequest(
            request_id=f"r{next(self._ids)}",
            prompt_token_ids=list(prompt),
            mm_features=None,
            sampling_params=with_output_tokens(params, given),
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        await self._host.core.add_request_async(request)
        outputs: list[EngineCoreOutput] = []
        while not (outputs and outputs[-1].finished):
            step = await self._host.core.get_output_async()
            outputs += [each for each in step.outputs if each.request_id == request.request_id]
        return outputs


def tokens_of(outputs: Sequence[EngineCoreOutput]) -> list[int]:
    return [token for output in outputs for token in output.new_token_ids]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[Engine]:
    host = await EngineHost.start(engine_args(resolve_model("demo"), OPTIONS))
    yield Engine(host)
    host.stop()


def sampling(case: str) -> SamplingParams:
    params = SamplingParams(max_tokens=NUM_TOKENS, **CASES[case])
    params._eos_token_id = EOS
    return params


@pytest.mark.parametrize("case", CASES)
async def test_a_continued_answer(engine: Engine, case: str) -> None:
    whole = await engine.ask(sampling(case))
    tokens = tokens_of(whole)
    assert len(tokens) > 1
    for cut in range(1, len(tokens)):
        rest = await engine.ask(sampling(case), tokens[:cut])
        assert tokens_of(rest) == tokens[cut:], cut
        assert rest[-1].finish_reason == whole[-1].finish_reason
        assert rest[-1].stop_reason == whole[-1].stop_reason


async def test_a_seeded_prompt_that_is_read_in_several_steps(engine: Engine) -> None:
    """On a CPU this ends vLLM's own engine, and with it whatever runs beside."""
    params = sampling("seed")
    whole = tokens_of(await engine.ask(params, prompt=LONG_PROMPT))
    assert tokens_of(await engine.ask(params, whole[:3], prompt=LONG_PROMPT)) == whole[3:]


async def test_tokens_that_a_grammar_forbids_are_an_error_of_that_request(engine: Engine) -> None:
    outputs = await engine.ask(sampling("regex"), [5, 5, 5])
    assert outputs[-1].finish_reason == FinishReason.ERROR
    assert tokens_of(await engine.ask(sampling("greedy")))
