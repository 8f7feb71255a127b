"""Which engine options are refused, mostly in vLLM's own words, and which are not."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.config import parse_args
from cluster.engine_options import check_engine_options
from cluster.errors import MAX_LINE, ConfigError

DRAFT = {"method": "eagle", "model": "org/draft", "num_speculative_tokens": 3}
WRONG = [
    ("misspelt", {"max-model-len": 1}, "max-model-len: vLLM has no such engine option; did you "
     "mean max_model_len?"),
    ("private", {"_api_process_count": 2}, "_api_process_count: vLLM has no such engine option"),
    ("length-one", {"max_model_len": 1}, "max_model_len: 1 is not at least 2"),
    ("length-negative", {"max_model_len": -5}, "max_model_len: -5 is not at least -1"),
    ("length-text", {"max_model_len": "auto"}, "max_model_len: 'auto' is not a whole number"),
    ("seqs-zero", {"max_num_seqs": 0}, "max_num_seqs: 0 is not at least 1"),
    ("seqs-bool", {"max_num_seqs": True}, "max_num_seqs: True is not a whole number"),
    ("block", {"block_size": 0}, "block_size: 0 is not greater than 0"),
    ("blocks", {"num_gpu_blocks_override": 0}, "num_gpu_blocks_override: 0 is not at least 1"),
    ("batch", {"max_num_batched_tokens": -1}, "max_num_batched_tokens: -1 is not at least 1"),
    ("memory-over-one", {"gpu_memory_utilization": 1.5},
     "gpu_memory_utilization: 1.5 is not at most 1"),
    ("memory-nan", {"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization: nan is not"),
    ("memory-zero", {"gpu_memory_utilization": 0}, "gpu_memory_utilization: 0 is not greater"),
    ("watermark", {"watermark": 1.0}, "watermark: 1.0 is not less than 1"),
    ("logprobs", {"max_logprobs": -7}, "max_logprobs: -7 is not at least -1"),
    ("interval", {"stream_interval": 0}, "stream_interval: 0 is not at least 1"),
    ("lora-rank", {"max_lora_rank": 7}, "max_lora_rank: 7 is not one of 1, 8, 16"),
    ("loras", {"max_loras": 0}, "max_loras: 0 is not at least 1"),
    ("dtype", {"dtype": "float7"}, "dtype: 'float7' is not one of auto, half, float16"),
    ("kv-dtype", {"kv_cache_dtype": "fp7"}, "kv_cache_dtype: 'fp7' is not one of auto"),
    ("images", {"limit_mm_per_prompt": {"image": -1}}, "is not at least 0"),
    ("images-text", {"limit_mm_per_prompt": {"image": "x"}}, "limit_mm_per_prompt.image"),
    ("overrides", {"hf_overrides": 5}, "hf_overrides: 5 is not a mapping"),
    ("loader", {"model_loader_extra_config": "x"}, "model_loader_extra_config: 'x' is not a map"),
    ("sizes", {"cudagraph_capture_sizes": ["a"]},
     "cudagraph_capture_sizes.0: 'a' is not a whole number"),
    ("backend", {"attention_backend": "nope"}, "attention_backend: Unknown attention backend"),
    ("compilation", {"compilation_config": {"mode": 77}},
     "compilation_config.mode: 77 is not one of 0, 1, 2, 3"),
    ("compilation-text", {"compilation_config": "x"}, "compilation_config: "),
    ("kernel", {"kernel_config": {"moe_backend": "x"}}, "kernel_config.moe_backend: 'x' is not on"),
    ("structured", {"structured_outputs_config": {"backend": "nope"}},
     "structured_outputs_config.backend: 'nope' is not one of auto, xgrammar, guidance"),
    ("structured-text", {"structured_outputs_config": "xgrammar"},
     "structured_outputs_config: 'xgrammar' is not a mapping"),
    ("structured-field", {"structured_outputs_config": {"backed": "auto"}},
     "structured_outputs_config.backed: no such field"),
    ("parser", {"reasoning_parser": "nope"}, "reasoning_parser: 'nope' is not one of cohere"),
    ("parser-case", {"reasoning_parser": "Qwen3"}, "reasoning_parser: 'Qwen3' is not one of"),
    ("parser-inside", {"structured_outputs_config": {"reasoning_parser": "nope"}},
     "structured_outputs_config.reasoning_parser: 'nope' is not one of"),
    ("parser-plugin", {"reasoning_parser_plugin": "/no/such.py"},
     "reasoning_parser_plugin: '/no/such.py' is not a file on this machine"),
    ("quantization", {"quantization": "nope"}, "quantization: 'nope' is not one of auto_awq"),
    ("load-format", {"load_format": "nope"}, "load_format: 'nope' is not one of auto, dummy"),
    ("tokenizer-mode", {"tokenizer_mode": "nope"}, "tokenizer_mode: 'nope' is not one of auto"),
    ("config-format", {"config_format": "nope"}, "config_format: 'nope' is not one of auto, hf"),
    ("executor", {"distributed_executor_backend": "nope"},
     "distributed_executor_backend: 'nope' is not one of external_launcher, mp, ray, uni"),
    ("worker", {"worker_cls": "nope"}, "worker_cls: 'nope' is not one of a class as module.name"),
    ("overrides-key", {"hf_overrides": {1: 2}}, "hf_overrides.1: 1 is not a text"),
    ("implementation", {"model_impl": "nope"}, "model_impl: 'nope' is not one of auto"),
    ("renderers", {"renderer_num_workers": 0}, "renderer_num_workers: 0 is not at least 1"),
    ("log-level", {"logging_config": {"log_level": "loud"}}, "logging_config.log_level: 'loud' is"),
    ("draft-text", {"speculative_config": "ngram"}, "speculative_config: 'ngram' is not a mapping"),
    ("draft-empty", {"speculative_config": {}}, "speculative_config: num_speculative_tokens must"),
    ("draft-method", {"speculative_config": {"method": "nope"}},
     "speculative_config.method: 'nope' is not one of ngram, medusa"),
    ("draft-field", {"speculative_config": {"methd": "ngram"}},
     "speculative_config.methd: no such field"),
    ("draft-tokens", {"speculative_config": {**DRAFT, "num_speculative_tokens": 0}},
     "speculative_config.num_speculative_tokens: 0 is not greater than 0"),
    ("draft-model", {"speculative_config": {"method": "eagle", "num_speculative_tokens": 3}},
     "speculative_config: num_speculative_tokens was provided but without speculative model"),
    ("draft-lookup", {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3,
                                             "prompt_lookup_min": 9, "prompt_lookup_max": 2}},
     "speculative_config: prompt_lookup_min=9 must be <= prompt_lookup_max=2"),
]  # fmt: skip


def refusal(args: dict[str, Any]) -> str | None:
    try:
        check_engine_options(parse_args(args))
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("options", "part"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG]
)
def test_an_option_that_vllm_would_not_take(options: dict[str, Any], part: str) -> None:
    line = refusal({"engine": options})
    assert line is not None
    assert line.startswith(f"engine.{part}") or part in line
    assert line.startswith("engine.")
    assert len(line) <= MAX_LINE


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        pytest.param(
            {"max_num_seqs": 100, "max_num_batched_tokens": 10},
            "max_num_batched_tokens (10) must be greater than or equal to max_num_seqs (100)",
            id="more-sequences-than-tokens",
        ),
        pytest.param(
            {"max_model_len": 99, "max_num_batched_tokens": 10, "enable_chunked_prefill": False},
            "max_num_batched_tokens (10) is smaller than max_model_len (99)",
            id="prompts-in-one-piece",
        ),
        pytest.param(
            {"max_num_active_seqs": 9, "max_num_seqs": 4},
            "max_num_active_seqs (9) cannot be greater than max_num_seqs (4)",
            id="more-active-than-any",
        ),
    ],
)
def test_options_that_vllm_would_not_take_together(options: dict[str, Any], reason: str) -> None:
    line = refusal({"engine": options})
    assert line is not None
    assert line.startswith(f"prefill.engine: {reason}")


def test_a_pool_is_named_with_its_option() -> None:
    line = refusal({"decode": {"engine": {"max_num_seqs": "many"}}})
    assert line == "decode.engine.max_num_seqs: 'many' is not a whole number"


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"max_model_len": None}, id="length-null"),
        pytest.param({"max_num_seqs": None, "block_size": None, "revision": None}, id="null"),
        pytest.param({"max_model_len": -1}, id="length-that-fits"),
        pytest.param({"max_model_len": 4096, "max_num_batched_tokens": 512}, id="in-pieces"),
        pytest.param({"max_num_batched_tokens": 64}, id="few-tokens"),
        pytest.param({"max_num_active_seqs": 500}, id="active"),
        pytest.param({"long_prefill_token_threshold": 9000}, id="threshold"),
        pytest.param({"gpu_memory_utilization": 1}, id="whole-for-a-fraction"),
        pytest.param({"quantization": "FP8", "load_format": "SafeTensors"}, id="upper-case"),
        pytest.param({"attention_backend": "FLASH_ATTN"}, id="attention"),
        pytest.param({"distributed_executor_backend": "module.Executor"}, id="executor-class"),
        pytest.param({"limit_mm_per_prompt": {"image": 2}}, id="images"),
        pytest.param({"enable_lora": True, "max_loras": 2, "max_cpu_loras": 4}, id="adapters"),
        pytest.param({"enable_lora": True, "lora_dtype": "bfloat16"}, id="adapters-dtype"),
        pytest.param({"cpu_offload_params": ["a"]}, id="list-for-a-set"),
        pytest.param({"compilation_config": {"cudagraph_mode": "NONE"}}, id="compilation"),
        pytest.param({"structured_outputs_config": {"backend": "xgrammar"}}, id="structured"),
        pytest.param({"reasoning_parser": "qwen3"}, id="reasoning-parser"),
        pytest.param({"speculative_config": None}, id="no-draft"),
    ],
)
def test_an_option_that_vllm_would_take(options: dict[str, Any]) -> None:
    assert refusal({"engine": options}) is None


@pytest.mark.parametrize(
    "draft",
    [
        pytest.param(DRAFT, id="eagle"),
        pytest.param({"method": "ngram", "num_speculative_tokens": 3}, id="ngram"),
        pytest.param({"method": "mtp", "num_speculative_tokens": 1}, id="mtp"),
    ],
)
def test_drafts_are_for_gpus(draft: dict[str, Any]) -> None:
    on_gpus = {"prefill": {"gpus": 1}, "decode": {"gpus": 1}}
    assert refusal({"engine": {"speculative_config": draft}, **on_gpus}) is None
    line = refusal({"engine": {"speculative_config": draft}})
    assert line is not None
    assert line.startswith("prefill.engine.speculative_config: is for pools on GPUs")


def test_a_parser_of_a_plugin_is_known(tmp_path: Path) -> None:
    plugin = tmp_path / "own_parser.py"
    plugin.write_text(
        "from vllm.reasoning import ReasoningParserManager as parsers\n"
        "qwen3 = parsers.get_reasoning_parser('qwen3')\n"
        "parsers.register_module(name='of_a_plugin', module=qwen3)\n"
    )
    options = {"reasoning_parser": "of_a_plugin"}
    assert refusal({"engine": options}) is not None
    assert refusal({"engine": {**options, "reasoning_parser_plugin": str(plugin)}}) is None


def test_vllm_is_not_imported_where_nothing_is_asked_of_it() -> None:
    script = (
        "import sys; from cluster.config import parse_args\n"
        "from cluster.engine_options import check_engine_options\n"
        "check_engine_options(parse_args({'model': 'org/model', 'prefill': {'gpus': 1}}))\n"
        "print('vllm' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False False\n"
