"""From GGUF to a checkpoint: a model of one layer that the gguf package writes."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from engine.gguf_checkpoint import checkpoint_name, unpermute, write_checkpoint

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, INNER = 3, 1, 8, 64
HIDDEN = NUM_HEADS * HEAD_DIM * 4
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "1", "2", "Ġ", "ab", "12"]


def permuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """As llama.cpp's converter has it (`LlamaModel.permute`)."""
    shape = (num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape)


def layer(random: np.random.Generator) -> dict[str, np.ndarray]:
    """By the names of a checkpoint, in values that bfloat16 has."""
    shapes = {
        "input_layernorm": (HIDDEN,),
        "self_attn.q_proj": (NUM_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": (NUM_KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj": (NUM_KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, NUM_HEADS * HEAD_DIM),
        "post_attention_layernorm": (HIDDEN,),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    return {
        name: random.integers(-128, 128, shape).astype(np.float32) for name, shape in shapes.items()
    }


def write_gguf(path: Path, weights: dict[str, np.ndarray]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 7)
    writer.add_token_merges(["a b", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("num_heads", [1, 3, 9])
def test_unpermute_is_the_reverse(num_heads: int) -> None:
    weight = np.arange(num_heads * HEAD_DIM * 5, dtype=np.float32).reshape(-1, 5)
    back = unpermute(torch.tensor(permuted(weight, num_heads)), num_heads)
    assert back.tolist() == weight.tolist()


def test_checkpoint_has_what_the_gguf_file_has(tmp_path: Path) -> None:
    parts = layer(np.random.default_rng(0))
    embedding = np.arange(len(TOKENS) * HIDDEN, dtype=np.float32).reshape(-1, HIDDEN) % 128
    gguf_parts = {
        "attn_norm": parts["input_layernorm"],
        "attn_q": permuted(parts["self_attn.q_proj"], NUM_HEADS),
        "attn_k": permuted(parts["self_attn.k_proj"], NUM_KV_HEADS),
        "attn_v": parts["self_attn.v_proj"],
        "attn_output": parts["self_attn.o_proj"],
        "ffn_norm": parts["post_attention_layernorm"],
        "ffn_gate": parts["mlp.gate_proj"],
        "ffn_up": parts["mlp.up_proj"],
        "ffn_down": parts["mlp.down_proj"],
    }
    write_gguf(
        tmp_path / "model.gguf",
        {f"blk.0.{name}.weight": weight for name, weight in gguf_parts.items()}
        | {"token_embd.weight": embedding, "output_norm.weight": np.ones(HIDDEN, np.float32)},
    )
    write_checkpoint(tmp_path / "model.gguf", tmp_path)

    weights = load_file(tmp_path / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    expected = {f"model.layers.0.{name}.weight": weight for name, weight in parts.items()} | {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": np.ones(HIDDEN, np.float32),
    }
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert weights[name].float().tolist() == weight.tolist(), name

    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (3, 1)
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-5, 100000.0)

    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    # Letters are merged, digits are not, and a special token is one.
    assert tokenizer.encode("ab 12<|im_end|>").tokens == ["ab", "Ġ", "1", "2", "<|im_end|>"]
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|im_end|>"
    assert settings["chat_template"] == "{{ messages[0]['content'] }}"


@pytest.mark.parametrize("name", ["output.weight", "blk.0.attn_q.bias", "rope_freqs.weight"])
def test_weights_that_this_does_not_know_are_refused(name: str) -> None:
    with pytest.raises(KeyError):
        checkpoint_name(name)
