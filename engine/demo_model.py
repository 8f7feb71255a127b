"""The demo model: a small random Llama checkpoint, the same bytes every time.

Owns nothing at run time; it writes a folder that vLLM loads like any other checkpoint. The weights
are random, so the answers are noise; everything around them (tokenizer, template, shapes) is real.
"""

import json
import shutil
from pathlib import Path

from engine.model_cache import whole_folder

MARK = "pdserve-demo"
"""The file that tells a demo model from somebody's own folder."""
VOCAB_SIZE = 768
SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>")
MAX_POSITIONS = 4096

CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 1024,
    "max_position_embeddings": MAX_POSITIONS,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": VOCAB_SIZE,
}

# What the tokenizer learns its merges from: enough plain English, code, JSON and numbers for a
# vocabulary of 768 entries. Written for this purpose.
_SENTENCES = """\
A cluster serves one model through two pools of engines, and each pool has its own target.
The prefill replica reads the whole prompt at once and writes the keys and values of every layer.
The decode replica pulls those blocks over the network and writes the answer, one token at a time.
Time to first token is what a reader waits for; the latency between tokens is how smoothly it reads.
When the queue grows, the router looks at two replicas at random and takes the one with less work.
Once upon a time there was a small engine that wanted to answer every question it was given.
Please write a short summary of the following text, in simple words, for someone new to the field.
What is the capital of France? Where does the river begin, and how long does the journey take?
You are a helpful assistant. Answer the user's question as well as you can, and say what is unknown.
The weather today is cold and bright, with a light wind from the north and some rain in the evening.
def add(left: int, right: int) -> int: return left + right  # the sum of both numbers
for index in range(10): print(index, index * index, sep=", ", end=".")
import json; value = json.loads('{"name": "demo", "numbers": [1, 2, 3], "nested": {"key": null}}')
{"type": "object", "properties": {"city": {"type": "string"}, "count": {"type": "integer"}}}
SELECT name, price FROM products WHERE price > 100 ORDER BY price DESC LIMIT 20;
In 1969 people walked on the moon; in 2024 about 8,100,000,000 people lived on this planet.
First, second, third, fourth, fifth: the order of the steps matters more than their number.
She opened the window, looked at the garden and said that the morning had never been so quiet.
They built a bridge across the water, and trade between the two towns grew from year to year.
Mathematics, music, history, language, science and art are subjects that children learn at school.
"""


def write_demo_model(target: Path) -> None:
    """Writes the checkpoint to `target`, replacing a demo model that is there.

    Raises:
        FileExistsError: `target` holds something that is not a demo model.
    """
    if (target / MARK).exists():
        shutil.rmtree(target, ignore_errors=True)
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} holds other files: name an empty or new folder")
    with whole_folder(target) as draft:
        write_tokenizer(draft)
        _write_weights(draft)
        _write_json(draft / "config.json", MODEL_CONFIG)
        _write_json(draft / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})
        (draft / MARK).write_text("written by: pdserve demo-model\n")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES.splitlines(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL_TOKENS[0],
            "eos_token": SPECIAL_TOKENS[1],
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "model_max_length": MAX_POSITIONS,
        },
    )


def _write_weights(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    hidden = int(str(MODEL_CONFIG["hidden_size"]))
    inner = int(str(MODEL_CONFIG["intermediate_size"]))
    head_dim = int(str(MODEL_CONFIG["head_dim"]))
    query = int(str(MODEL_CONFIG["num_attention_heads"])) * head_dim
    key_value = int(str(MODEL_CONFIG["num_key_value_heads"])) * head_dim

    def normal(rows: int, columns: int) -> torch.Tensor:
        # Unit gain keeps the logits far apart, so that greedy answers do not hang on rounding.
        weight = torch.randn(rows, columns, generator=generator)
        scaled: torch.Tensor = weight / columns**0.5
        return scaled

    weights = {
        "model.embed_tokens.weight": torch.randn(VOCAB_SIZE, hidden, generator=generator),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": normal(VOCAB_SIZE, hidden) * 4,
    }
    for layer in range(int(str(MODEL_CONFIG["num_hidden_layers"]))):
        prefix = f"model.layers.{layer}"
        weights |= {
            f"{prefix}.input_layernorm.weight": torch.ones(hidden),
            f"{prefix}.post_attention_layernorm.weight": torch.ones(hidden),
            f"{prefix}.self_attn.q_proj.weight": normal(query, hidden),
            f"{prefix}.self_attn.k_proj.weight": normal(key_value, hidden),
            f"{prefix}.self_attn.v_proj.weight": normal(key_value, hidden),
            f"{prefix}.self_attn.o_proj.weight": normal(hidden, query),
            f"{prefix}.mlp.gate_proj.weight": normal(inner, hidden),
            f"{prefix}.mlp.up_proj.weight": normal(inner, hidden),
            f"{prefix}.mlp.down_proj.weight": normal(hidden, inner),
        }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
