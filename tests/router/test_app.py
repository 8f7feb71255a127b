"""vLLM's front end over the cluster: what it does with priorities and images."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.config import ParallelConfig
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.cache.base import MultiModalProcessorOnlyCache
from vllm.multimodal.cache.factories import processor_cache_from_config
from vllm.v1.engine.async_llm import AsyncLLM

from router.app import ClusterLLM, send_images_whole


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> ClusterLLM:
    """One that answers with what vLLM would be asked."""

    async def add_request(self: AsyncLLM, *args: Any, **options: Any) -> tuple[Any, Any]:
        return args, options

    monkeypatch.setattr(AsyncLLM, "__init__", lambda self, **options: None)
    monkeypatch.setattr(AsyncLLM, "__del__", lambda self: None)
    monkeypatch.setattr(AsyncLLM, "add_request", add_request)
    core: Any = None
    parallel = SimpleNamespace(distributed_executor_backend="uni")
    config: Any = SimpleNamespace(parallel_config=parallel)
    return ClusterLLM(config, core, (-10, 10))


@pytest.mark.parametrize(
    ("asked", "taken"),
    [(0, 0), (-10, -10), (7, 7), (11, 10), (10**30, 10), (-(2**63), -10)],
)
async def test_what_a_client_does_not_decide(llm: ClusterLLM, asked: int, taken: int) -> None:
    params = SamplingParams(extra_args={"kv_transfer_params": "x", "other": 1})
    added = await llm.add_request("r", "a", params, priority=asked, session_id="s")
    assert added == (("r", "a", params), {"priority": taken, "session_id": "s"})
    assert params.extra_args == {"other": 1}


async def test_a_number_beyond_64_bits_is_refused(llm: ClusterLLM) -> None:
    params = SamplingParams(top_k=10**30)
    with pytest.raises(VLLMValidationError, match="top_k"):
        await llm.add_request("r", "a", params)


def test_no_engine_is_thought_to_have_seen_an_image() -> None:
    images = SimpleNamespace(mm_processor_cache_gb=1, mm_processor_cache_type="lru")
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(
            supports_multimodal_inputs=True, get_multimodal_config=lambda: images
        ),
        parallel_config=ParallelConfig(),
    )
    assert not isinstance(processor_cache_from_config(config), MultiModalProcessorOnlyCache)
    send_images_whole(config)
    assert isinstance(processor_cache_from_config(config), MultiModalProcessorOnlyCache)
