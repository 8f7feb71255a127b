"""A checkpoint of a model that sees: Llava with random weights, far smaller than any real one.

What it answers is noise, but another noise for every image. Its processor is Pillow's alone, so it
needs no torchvision.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from engine.demo_model import write_tokenizer

IMAGE_TOKEN = "<image>"
IMAGE_SIZE, PATCH_SIZE = 56, 14
"""In pixels: each image is sixteen tokens."""


def write_vision_model(folder: Path) -> None:
    write_tokenizer(folder)
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    _model(tokenizer).save_pretrained(folder)
    pixels = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=pixels, crop_size=pixels),
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def _model(tokenizer: Any) -> Any:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
        ),
        text_config=LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            vocab_size=len(tokenizer),
            max_position_embeddings=1024,
            bos_token_id=0,
            eos_token_id=1,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-1,
    )
    generator = torch.Generator().manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            # Unit gain, as in the demo model: greedy answers do not hang on rounding.
            num_inputs = weight[0].numel()
            drawn = torch.randn(weight.shape, generator=generator) / num_inputs**0.5
            weight.data.copy_(drawn)
    # Images are to be seen as clearly as words.
    model.model.language_model.embed_tokens.weight.data.mul_(8.0)
    return model
