"""A checkpoint of a model that sees: BLIP-2 with random weights, far smaller than any real one.

What it answers is noise, but another noise for every image. Neither vLLM's code of it nor its
processor needs torchvision.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from engine.demo_model import write_tokenizer

IMAGE_TOKEN = "<image>"
NUM_IMAGE_TOKENS = 16
IMAGE_SIZE, PATCH_SIZE = 28, 14
NUM_LAYERS, NUM_HEADS, HEAD_DIM = 2, 2, 32
"""Of its language model."""
KV_BYTES_PER_TOKEN = NUM_LAYERS * 2 * NUM_HEADS * HEAD_DIM * 4
"""In float32."""


def write_vision_model(folder: Path) -> None:
    write_tokenizer(folder)
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
    pixels = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    # It gives the tokenizer the image's token.
    processor = Blip2Processor(
        image_processor=BlipImageProcessorPil(size=pixels),
        tokenizer=tokenizer,
        num_query_tokens=NUM_IMAGE_TOKENS,
    )
    processor.save_pretrained(folder)
    _model(tokenizer).save_pretrained(folder)


def _model(tokenizer: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    hidden = NUM_HEADS * HEAD_DIM
    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            **sizes, num_hidden_layers=2, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE
        ),
        qformer_config=Blip2QFormerConfig(
            **sizes, num_hidden_layers=2, encoder_hidden_size=32, vocab_size=8
        ),
        text_config=OPTConfig(
            hidden_size=hidden,
            word_embed_proj_dim=hidden,
            ffn_dim=2 * hidden,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=NUM_HEADS,
            max_position_embeddings=1024,
            vocab_size=len(tokenizer),
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            # Or each token would be followed by itself.
            tie_word_embeddings=False,
        ),
        tie_word_embeddings=False,
        num_query_tokens=NUM_IMAGE_TOKENS,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    )
    generator = torch.Generator().manual_seed(0)
    model: Any = Blip2ForConditionalGeneration(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            # Unit gain, as in the demo model: greedy answers do not hang on rounding.
            drawn = torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5
            weight.data.copy_(drawn)
    # Each token is much told by those before it, and the image by what is in it.
    for layer in model.language_model.model.decoder.layers:
        layer.self_attn.out_proj.weight.data.mul_(4.0)
    model.language_projection.weight.data.mul_(4.0)
    return model
