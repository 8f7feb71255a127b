"""What vLLM says of a whole engine, and where it cannot be asked."""

import os
from pathlib import Path
from typing import Any

import pytest

from cluster.config import parse_args
from cluster.engine_config import start_options
from cluster.engine_options import check_engine_options
from cluster.errors import MAX_LINE, ConfigError
from engine.models import resolve_model


def refusal(args: dict[str, Any]) -> str | None:
    resolve_model("demo")  # written where it is not yet
    try:
        check_engine_options(parse_args(args), whole=True)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        pytest.param(
            {"engine": {"max_model_len": 1_000_000}},
            ("engine: ", "max_model_len (1000000) is greater than the derived max_model_len"),
            id="longer-than-the-model",
        ),
        pytest.param(
            {"engine": {"tensor_parallel_size": 3}},
            ("engine: ", "attention heads (4) must be divisible by tensor parallel size (3)"),
            id="heads-that-cannot-be-divided",
        ),
        pytest.param(
            {"decode": {"engine": {"enable_sleep_mode": True}}},
            ("decode.engine: ", "Sleep mode is not supported on current platform"),
            id="not-on-this-platform",
        ),
        pytest.param(
            {"engine": {"enable_chunked_prefill": False, "max_num_batched_tokens": 64}},
            ("engine: ", "max_num_batched_tokens (64) is smaller than max_model_len (4096)"),
            id="prompts-in-one-piece",
        ),
    ],
)
def test_an_engine_that_vllm_would_not_start(args: dict[str, Any], parts: tuple[str, str]) -> None:
    line = refusal(args)
    assert line is not None
    assert line.startswith(parts[0])
    assert parts[1] in line
    assert len(line) <= MAX_LINE


LONG = {"max_model_len": 1_000_000}
GPU = {"gpus": 1}


@pytest.mark.parametrize(
    "args",
    [
        pytest.param({"engine": {"max_model_len": 512, "enable_lora": True}}, id="fits"),
        pytest.param({"engine": {"reasoning_parser": "qwen3"}}, id="reasoning-parser"),
        pytest.param(
            {"decode": {"nodes": 2, "engine": {"tensor_parallel_size": 2}}}, id="spans-nodes"
        ),
        pytest.param({"engine": LONG, "model": "org/model"}, id="model-to-be-fetched"),
        pytest.param({"engine": LONG, "prefill": GPU, "decode": GPU}, id="on-gpus"),
        pytest.param(
            {"engine": {**LONG, "tokenizer": "org/tokenizer"}}, id="tokenizer-to-be-fetched"
        ),
        pytest.param(
            {
                "engine": LONG,
                "prefill": {"env": {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}},
                "decode": {"env": {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}},
            },
            id="allowed-by-the-environment",
        ),
    ],
)
def test_an_engine_that_vllm_may_start(args: dict[str, Any]) -> None:
    assert refusal(args) is None


def test_asking_changes_no_environment() -> None:
    before = dict(os.environ)
    refusal({"engine": {"max_model_len": 512}, "prefill": {"env": {"OF_A_POOL": "1"}}})
    assert dict(os.environ) == before


def test_a_folder_is_asked_as_the_demo_is() -> None:
    folder = resolve_model("demo")
    assert Path(folder).is_dir()
    line = refusal({"engine": LONG, "model": str(folder)})
    assert line is not None
    assert "is greater than the derived max_model_len" in line


def test_what_engines_start_with() -> None:
    config = parse_args({"engine": {"max_num_seqs": 8}, "prefill": {"kv_cache_gib": 2}})
    assert start_options(config, "prefill") == {
        "kv_cache_memory_bytes": 2**31,
        "scheduling_policy": "priority",
        "max_num_seqs": 8,
    }
    assert start_options(config, "decode") == {"kv_cache_memory_bytes": 2**30, "max_num_seqs": 8}
