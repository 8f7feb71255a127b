"""What vLLM's app over the cluster is told of images."""

from types import SimpleNamespace
from typing import Any

from vllm.config import ParallelConfig
from vllm.multimodal.cache.base import MultiModalProcessorOnlyCache
from vllm.multimodal.cache.factories import processor_cache_from_config

from router.app import send_images_whole


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
