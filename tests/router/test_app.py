"""vLLM's front end over the cluster: what it does with priorities and images."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import ParallelConfig
from vllm.multimodal.cache.base import MultiModalProcessorOnlyCache
from vllm.multimodal.cache.factories import processor_cache_from_config
from vllm.v1.engine.async_llm import AsyncLLM

from router.app import ClusterLLM, send_images_whole


@pytest.mark.parametrize(
    ("asked", "taken"),
    [(0, 0), (-10, -10), (7, 7), (11, 10), (10**30, 10), (-(2**63), -10)],
)
async def test_a_client_has_no_other_priority_than_it_may(
    monkeypatch: pytest.MonkeyPatch, asked: int, taken: int
) -> None:
    async def add_request(self: AsyncLLM, request_id: str, **options: Any) -> tuple[str, Any]:
        return request_id, options

    monkeypatch.setattr(AsyncLLM, "__init__", lambda self, **options: None)
    monkeypatch.setattr(AsyncLLM, "__del__", lambda self: None)
    monkeypatch.setattr(AsyncLLM, "add_request", add_request)
    core: Any = None
    parallel = SimpleNamespace(distributed_executor_backend="uni")
    config: Any = SimpleNamespace(parallel_config=parallel)
    llm = ClusterLLM(config, core, (-10, 10))
    assert await llm.add_request("r", priority=asked, params=1) == (
        "r",
        {"priority": taken, "params": 1},
    )


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
