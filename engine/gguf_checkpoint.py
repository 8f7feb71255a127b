"""From a Llama in a GGUF file to a checkpoint that vLLM loads: weights, config, tokenizer.

Owns as much of the format as SmolLM2 uses. transformers reads GGUF too, but cannot save the weights
again, and joins digits of other scripts that the model's own tokenizer keeps apart.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader

_LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_PARTS = {"token_embd": "embed_tokens", "output_norm": "norm"}
_CONTROL_TOKEN = 3


def write_checkpoint(file: Path, folder: Path) -> None:
    """Writes the model of a GGUF file into `folder`, in bfloat16.

    Raises:
        OSError: the disk is full.
        KeyError: the file lacks what a Llama has, or has what a Llama with tied embeddings lacks.
    """
    from gguf import GGUFReader
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    reader = GGUFReader(file)
    config = _model_config(reader)
    weights = dict(_weights(reader, config))
    try:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    _write_tokenizer(reader, folder, max_length=config["max_position_embeddings"])
    _write_json(folder / "config.json", config)


def unpermute(weight: "torch.Tensor", num_heads: int) -> "torch.Tensor":
    """Rows of a q or k projection in the order of transformers and vLLM.

    GGUF has the two dimensions that rotate together side by side, [head, pair, 2]; in a checkpoint
    all first ones of a head come before all second ones, [head, 2, pair].
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def checkpoint_name(gguf_name: str) -> str:
    """What a weight of a GGUF file is called in a checkpoint."""
    match gguf_name.split("."):
        case ["blk", layer, part, "weight"]:
            return f"model.layers.{layer}.{_LAYER_PARTS[part]}.weight"
        case [part, "weight"]:
            return f"model.{_TOP_PARTS[part]}.weight"
    raise KeyError(gguf_name)


def _weights(reader: "GGUFReader", config: dict[str, Any]) -> Iterator[tuple[str, "torch.Tensor"]]:
    import torch
    from gguf.quants import dequantize

    num_heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config["num_key_value_heads"],
    }
    for tensor in reader.tensors:
        name = checkpoint_name(tensor.name)
        values = dequantize(tensor.data, tensor.tensor_type)
        weight = torch.tensor(values, dtype=torch.bfloat16)
        part = name.split(".")[-2]
        yield name, unpermute(weight, num_heads[part]) if part in num_heads else weight


def _model_config(reader: "GGUFReader") -> dict[str, Any]:
    def value(key: str) -> Any:
        return reader.fields[key].contents()

    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "head_dim": value("llama.rope.dimension_count"),
        "hidden_act": "silu",
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "max_position_embeddings": value("llama.context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": value("llama.attention.head_count"),
        "num_hidden_layers": value("llama.block_count"),
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "pad_token_id": value("tokenizer.ggml.padding_token_id"),
        # float32 in the file; the eighth digit on is noise.
        "rms_norm_eps": float(f"{value('llama.attention.layer_norm_rms_epsilon'):.7g}"),
        "rope_theta": value("llama.rope.freq_base"),
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": value("llama.vocab_size"),
    }


def _write_tokenizer(reader: "GGUFReader", folder: Path, *, max_length: int) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    def value(key: str) -> Any:
        return reader.fields[f"tokenizer.{key}"].contents()

    tokens = value("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in value("ggml.merges")]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, value("ggml.token_type"), strict=True)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token, kind in kinds if kind == _CONTROL_TOKEN]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[value("ggml.bos_token_id")],
            "eos_token": tokens[value("ggml.eos_token_id")],
            "pad_token": tokens[value("ggml.padding_token_id")],
            "unk_token": tokens[value("ggml.unknown_token_id")],
            "chat_template": value("chat_template"),
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_length,
        },
    )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
