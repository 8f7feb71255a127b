"""Which options both pools must have, and the reason where one has another."""

from typing import Any

import pytest

from cluster.pairing import pair_problem

EAGLE = {"method": "eagle", "model": "org/draft", "num_speculative_tokens": 3}
MTP = {"method": "deepseek_mtp", "num_speculative_tokens": 3}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3}
DRAFT = "engine.speculative_config: a draft with weights has KV of its own"
ROWS: list[tuple[str, dict[str, Any], dict[str, Any], str | None]] = [
    ("nothing", {}, {}, None),
    ("same", {"dtype": "float16"}, {"dtype": "float16"}, None),
    ("own-affair", {"max_num_seqs": 8}, {"enforce_eager": True}, None),
    ("null-is-unset", {"max_model_len": None}, {}, None),
    ("false-is-unset", {"enable_lora": False}, {}, None),
    ("auto-is-unset", {"dtype": "auto", "kv_cache_dtype": "auto"}, {}, None),
    ("two-names-of-one", {"dtype": "half"}, {"dtype": "float16"}, None),
    ("zero-is-not-unset", {"max_logprobs": 0}, {}, "engine.max_logprobs: 0 in prefill and unset"),
    ("lora", {}, {"enable_lora": True}, "engine.enable_lora: unset in prefill and True in decode"),
    ("revision", {"revision": "a"}, {"revision": "b"}, "engine.revision: a in prefill and b in de"),
    ("tokenizer", {"tokenizer": "a"}, {}, "engine.tokenizer: a in prefill and unset in decode"),
    ("logprobs", {}, {"logprobs_mode": "raw_logits"}, "engine.logprobs_mode: unset in prefill"),
    ("max-logprobs", {"max_logprobs": 5}, {"max_logprobs": 9}, "engine.max_logprobs: 5 in prefill"),
    ("quantization", {"quantization": "fp8"}, {}, "engine.quantization: fp8 in prefill and unset"),
    ("dummy-weights", {"load_format": "dummy"}, {}, "engine.load_format: dummy in prefill"),
    ("overrides", {"hf_overrides": {"a": 1}}, {"hf_overrides": {"a": 2}}, "engine.hf_overrides: "),
    ("parser", {"reasoning_parser": "qwen3"}, {}, "engine.reasoning_parser: qwen3 in prefill"),
    ("same-draft", {"speculative_config": EAGLE}, {"speculative_config": EAGLE}, None),
    ("more-of-a-draft", {"speculative_config": EAGLE},
     {"speculative_config": {**EAGLE, "num_speculative_tokens": 5}}, None),
    ("draft-in-decode", {}, {"speculative_config": EAGLE}, DRAFT),
    ("draft-in-prefill", {"speculative_config": EAGLE}, {}, DRAFT),
    ("other-draft", {"speculative_config": EAGLE},
     {"speculative_config": {**EAGLE, "model": "org/other"}}, DRAFT),
    ("draft-by-model", {}, {"speculative_config": {"model": "org/draft"}}, DRAFT),
    ("draft-beside-ngram", {"speculative_config": NGRAM}, {"speculative_config": EAGLE}, DRAFT),
    ("mtp", {"speculative_config": MTP}, {"speculative_config": MTP}, None),
    ("mtp-in-decode", {}, {"speculative_config": MTP}, DRAFT),
    ("fewer-mtp-modules", {"speculative_config": {**MTP, "num_speculative_tokens": 1}},
     {"speculative_config": MTP},
     "engine.speculative_config.num_speculative_tokens: 1 in prefill and 3 in decode must be the"),
    ("ngram-in-decode", {}, {"speculative_config": NGRAM}, None),
    ("ngram-by-model", {}, {"speculative_config": {"model": "ngram"}}, None),
    ("suffix-in-decode", {}, {"speculative_config": {"method": "suffix"}}, None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("prefill", "decode", "reason"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS]
)
def test_pair_problem(prefill: dict[str, Any], decode: dict[str, Any], reason: str | None) -> None:
    problem = pair_problem(prefill, decode)
    if reason is None:
        assert problem is None
    else:
        assert problem is not None
        assert problem.startswith(reason)
