"""Speculative decoding in a real pair of engines: the answers are those of one without it."""

import itertools
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from safetensors.torch import save_file
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest

from engine import probe
from engine.arguments import engine_args
from engine.demo_model import MODEL_CONFIG
from engine.host import EngineHost
from engine.models import resolve_model
from engine.output_tokens import with_output_tokens
from engine.steps import StepSample, step_sample
from kvtransfer.config import kv_transfer_config, transfer_env
from kvtransfer.credentials import Credentials
from kvtransfer.phase import Phase

pytestmark = pytest.mark.asyncio(loop_scope="module")

NUM_DRAFTS = 3
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": NUM_DRAFTS,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}
OPTIONS = {
    "max_model_len": 256,
    "kv_cache_memory_bytes": 2**26,
    "dtype": "float32",
    "block_size": 32,
    "enable_prefix_caching": False,
}
NUM_TOKENS = 40
REPEATING = [7, 11, 13, 17] * 12
PLAIN = list(range(5, 65))
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "penalty": {"repetition_penalty": 1.3},
    "min-tokens": {"min_tokens": 30},
}


class Engine:
    """One real engine, asked directly. Owns the samples of its steps."""

    def __init__(self, host: EngineHost) -> None:
        self.host = host
        self.samples: list[StepSample] = []
        self._ids = itertools.count()

    async def ask(
        self,
        prompt: list[int],
        *,
        max_tokens: int,
        given: tuple[int, ...] = (),
        kv: dict[str, Any] | None = None,
        **sampling: Any,
    ) -> list[EngineCoreOutput]:
        params = with_output_tokens(
            SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=max_tokens, **sampling),
            given,
        )
        params.extra_args = {**(params.extra_args or {}), "kv_transfer_params": kv}
        request = EngineCoreRequest(
            request_id=f"{uuid.uuid4().hex}-{next(self._ids)}",
            prompt_token_ids=prompt,
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        await self.host.core.add_request_async(request)
        outputs: list[EngineCoreOutput] = []
        while not (outputs and outputs[-1].finished):
            step = await self.host.core.get_output_async()
            outputs += [each for each in step.outputs if each.request_id == request.request_id]
            if step.scheduler_stats and (sample := step_sample(step.scheduler_stats)):
                self.samples.append(sample)
        return outputs


def tokens_of(outputs: list[EngineCoreOutput]) -> list[int]:
    return [token for output in outputs for token in output.new_token_ids]


async def start(role: Phase | None, **options: Any) -> EngineHost:
    if role is not None:
        options["kv_transfer_config"] = kv_transfer_config(
            role, engine_id=f"{role}-{uuid.uuid4().hex}", lease_s=30, backends=["UCX"]
        )
    args = engine_args(resolve_model("demo"), OPTIONS | options)
    return await EngineHost.start(args, credentials=Credentials(secret="secret"))


def write_eagle(folder: Path) -> dict[str, Any]:
    """A draft model of one layer for the demo model. Its weights are random, so it is mostly wrong;
    that has no bearing on the answers, and its KV is handed over like the model's."""
    hidden, inner = 256, 1024
    shapes = {
        "fc.weight": (hidden, 2 * hidden),
        "layers.0.self_attn.q_proj.weight": (256, hidden),
        "layers.0.self_attn.k_proj.weight": (128, hidden),
        "layers.0.self_attn.v_proj.weight": (128, hidden),
        "layers.0.self_attn.o_proj.weight": (hidden, 256),
        "layers.0.mlp.gate_proj.weight": (inner, hidden),
        "layers.0.mlp.up_proj.weight": (inner, hidden),
        "layers.0.mlp.down_proj.weight": (hidden, inner),
    }
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: torch.randn(*shape, generator=generator) / shape[1] ** 0.5
        for name, shape in shapes.items()
    }
    weights["layers.0.post_attention_layernorm.weight"] = torch.ones(hidden)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(MODEL_CONFIG | {"num_hidden_layers": 1}))
    return {"method": "eagle", "model": str(folder), "num_speculative_tokens": NUM_DRAFTS}


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["ngram", "eagle"])
async def engines(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[dict[str, Engine]]:
    """One without drafts, and a pair with them."""
    found = {}
    drafts = NGRAM if request.param == "ngram" else write_eagle(tmp_path_factory.mktemp("eagle"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in transfer_env("127.0.0.1").items():
            patch.setenv(name, value)
        # vLLM's CPU build reads memory that nobody has written where it samples beside a draft, and
        # an engine's first requests would end it. Greedy ones show what is handed over.
        first = probe._requests
        patch.setattr(probe, "_requests", lambda config: first(config)[:1])
        async with AsyncExitStack() as stack:
            for name, role in (("plain", None), ("prefill", "prefill"), ("decode", "decode")):
                options = {} if role is None else {"speculative_config": drafts}
                host = await start(role, **options)  # type: ignore[arg-type]
                stack.callback(host.stop)
                found[name] = Engine(host)
            yield found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("prompt", [REPEATING, PLAIN], ids=["repeating", "plain"])
async def test_a_pair_with_drafts_answers_as_one_engine_without(
    engines: dict[str, Engine], case: str, prompt: list[int]
) -> None:
    sampling = CASES[case]
    expected = tokens_of(await engines["plain"].ask(prompt, max_tokens=NUM_TOKENS, **sampling))
    handover = {"do_remote_decode": True, "do_remote_prefill": False}
    at_once = {**sampling, "min_tokens": min(1, sampling.get("min_tokens", 0))}
    (first,) = await engines["prefill"].ask(prompt, max_tokens=1, kv=handover, **at_once)
    decode = engines["decode"]
    decode.samples.clear()
    rest = await decode.ask(
        prompt,
        max_tokens=NUM_TOKENS,
        given=tuple(first.new_token_ids),
        kv=first.kv_transfer_params,
        **sampling,
    )
    assert [*first.new_token_ids, *tokens_of(rest)] == expected
    # Each of its steps was one of an answer, and none read a prompt.
    assert {sample.num_prefill_tokens for sample in decode.samples} == {0}
    assert {sample.num_decodes for sample in decode.samples} == {1}


@pytest.mark.parametrize("cut", [1, 2, 17, 39])
async def test_an_answer_that_moves_goes_on_with_drafts(
    engines: dict[str, Engine], cut: int
) -> None:
    expected = tokens_of(await engines["plain"].ask(REPEATING, max_tokens=NUM_TOKENS))
    given = tuple(expected[:cut])
    rest = await engines["decode"].ask(REPEATING, max_tokens=NUM_TOKENS, given=given)
    assert tokens_of(rest) == expected[cut:]


async def test_drafts_are_checked(engines: dict[str, Engine]) -> None:
    """Else nothing above has shown anything of them."""
    await engines["decode"].ask(REPEATING, max_tokens=NUM_TOKENS)
    assert any(sample.num_draft_tokens for sample in engines["decode"].samples)


async def test_these_engines_read_whole_prompts(engines: dict[str, Engine]) -> None:
    assert engines["prefill"].host.facts().num_dropped_tokens == 0
