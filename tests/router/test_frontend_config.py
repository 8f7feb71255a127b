"""What a router takes of its engines' options, on a node of any kind."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from build_for_gpus import WITHOUT_A_PLATFORM
from vllm.config import VllmConfig
from vllm.entrypoints.serve.utils.fingerprint import build_system_fingerprint

from engine.arguments import option_types
from engine.models import resolve_model
from router.frontend_config import FRONT_END_OPTIONS, front_end_args, front_end_config

ANSWERS = Path(__file__).with_name("answers_without_engines.py")
FRONT_END: dict[str, Any] = {
    "max_model_len": 512,
    "max_logprobs": 3,
    "max_num_seqs": 4,
    "reasoning_parser": "qwen3",
}
HERE = FRONT_END | {
    "dtype": "float32",
    "block_size": 32,
    "tensor_parallel_size": 2,
    "speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3},
}
"""An engine that vLLM would start on this machine."""
ENGINE_ONLY: dict[str, Any] = {
    "tensor_parallel_size": 8,
    "pipeline_parallel_size": 2,
    "decode_context_parallel_size": 2,
    "distributed_executor_backend": "ray",
    "enable_expert_parallel": True,
    "enable_eplb": True,
    "all2all_backend": "deepep_low_latency",
    "quantization": "modelopt_fp4",
    "kv_cache_dtype": "fp8",
    "block_size": 64,
    "num_gpu_blocks_override": 100,
    "gpu_memory_utilization": 0.9,
    "attention_backend": "FLASHINFER",
    "async_scheduling": True,
    "compilation_config": {"cudagraph_mode": "FULL"},
    "enable_sleep_mode": True,
    "load_format": "runai_streamer",
    "speculative_config": {"method": "mtp", "num_speculative_tokens": 2},
    "mm_processor_device": "cuda",
    "worker_cls": "no.such.Worker",
}
"""Of which nothing can be here."""


def ask(options: dict[str, Any], *arguments: str, path: Path | None = None) -> Any:
    paths = [*([str(path)] if path else []), *sys.path]
    return subprocess.Popen(
        [sys.executable, str(ANSWERS), json.dumps(options), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_router_without_a_gpu_answers_as_one_that_knows_the_whole_engine(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_A_PLATFORM)
    with (
        ask(HERE, "--whole") as whole,
        ask(FRONT_END | ENGINE_ONLY | {"dtype": "float32"}, path=tmp_path) as without,
    ):
        told, expected = (json.loads(each.communicate()[0].splitlines()[-1])
                          for each in (without, whole))  # fmt: skip
    assert (told["platform"], expected["platform"]) == ("UnspecifiedPlatform", "CpuPlatform")
    assert told["answers"] == expected["answers"]
    statuses = {name: status for name, (status, _) in told["answers"].items()}
    refused = {name for name, status in statuses.items() if status == 400}
    assert refused == {
        "too-long",
        "too-many-choices",
        "too-many-logprobs",
        "min-p",
        "wrong-schema",
        "embeddings",
    }
    assert {status for name, status in statuses.items() if name not in refused} == {200}


def fields(options: dict[str, Any]) -> dict[str, Any]:
    args = front_end_args("demo", options)
    return {each.name: getattr(args, each.name) for each in dataclasses.fields(args)}


@pytest.mark.parametrize("name", ENGINE_ONLY)
def test_what_only_engines_need_leaves_a_mark_in_the_fingerprint_and_nothing_else(
    name: str,
) -> None:
    without, with_it = fields(FRONT_END), fields(FRONT_END | {name: ENGINE_ONLY[name]})
    changed = {each for each in without if str(without[each]) != str(with_it[each])}
    assert changed == {"additional_config"}


def test_limits_of_images_reach_a_front_end() -> None:
    given = {"limit_mm_per_prompt": {"image": 2}, "mm_processor_kwargs": {"size": 64}}
    args = front_end_args("demo", given | ENGINE_ONLY)
    assert {name: getattr(args, name) for name in given} == given


def test_vllm_has_each_option_of_a_front_end() -> None:
    assert option_types().keys() >= FRONT_END_OPTIONS


REACH: list[tuple[dict[str, Any], Any, Any]] = [
    ({"max_model_len": 64}, lambda c: c.model_config.max_model_len, 64),
    ({"max_logprobs": 3}, lambda c: c.model_config.max_logprobs, 3),
    ({"logprobs_mode": "raw_logits"}, lambda c: c.model_config.logprobs_mode, "raw_logits"),
    ({"max_num_seqs": 3}, lambda c: c.scheduler_config.max_num_seqs, 3),
    ({"stream_interval": 4}, lambda c: c.scheduler_config.stream_interval, 4),
    ({"enable_prompt_embeds": True}, lambda c: c.model_config.enable_prompt_embeds, True),
    ({"enable_prefix_caching": False}, lambda c: c.cache_config.enable_prefix_caching, False),
    ({"override_generation_config": {"top_k": 7}},
     lambda c: c.model_config.override_generation_config, {"top_k": 7}),
    ({"structured_outputs_config": {"backend": "guidance"}},
     lambda c: c.structured_outputs_config.backend, "guidance"),
    ({"reasoning_parser": "qwen3"},
     lambda c: c.structured_outputs_config.reasoning_parser, "qwen3"),
    ({"reasoning_parser": "qwen3"}, lambda c: c.reasoning_config.enabled, True),
    ({"enable_lora": True, "max_lora_rank": 8}, lambda c: c.lora_config.max_lora_rank, 8),
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "look", "value"), REACH, ids=[next(reversed(row[0])) for row in REACH]
)
def test_what_a_front_end_needs_reaches_it(options: dict[str, Any], look: Any, value: Any) -> None:
    assert look(front_end_config(resolve_model("demo"), options | ENGINE_ONLY)) == value


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "fp8", "activation_scheme": "dynamic"},
        {"quant_method": "modelopt", "quant_algo": "NVFP4",
         "producer": {"name": "modelopt"},
         "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16}},
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
    ],
    ids=["fp8", "nvfp4", "compressed-tensors"],
)  # fmt: skip
def test_a_quantised_checkpoint_has_a_front_end(
    tmp_path: Path, quantization: dict[str, Any]
) -> None:
    folder = shutil.copytree(resolve_model("demo"), tmp_path / "model")
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | {"quantization_config": quantization}))
    config = front_end_config(str(folder), {"max_model_len": 512})
    assert config.quant_config is None


def fingerprint(options: dict[str, Any]) -> str:
    config: VllmConfig = front_end_config(resolve_model("demo"), options)
    made: str | None = build_system_fingerprint(config)
    assert made is not None
    return made


def test_the_fingerprint_tells_engines_apart() -> None:
    options = FRONT_END | ENGINE_ONLY
    assert fingerprint(options) == fingerprint(dict(reversed(options.items())))
    assert fingerprint(options) != fingerprint(options | {"quantization": "fp8"})
