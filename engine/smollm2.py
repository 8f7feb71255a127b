"""SmolLM2-135M-Instruct: a real chat model that two CPU cores can serve, without a model hub.

Owns how it becomes a checkpoint that vLLM loads. (c) Hugging Face, Apache-2.0.
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

from engine.errors import ModelUnavailable
from engine.gguf_checkpoint import write_checkpoint
from engine.model_cache import whole_folder
from engine.smollm2_download import smollm2_gguf

GENERATION_CONFIG = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    # For requests that do not say otherwise. At the authors' temperature of 0.2 a model this small
    # answers some plain questions in another language; without a penalty it may repeat one line
    # for ever.
    "temperature": 0.0,
    "repetition_penalty": 1.1,
}


def write_smollm2(target: Path, say: Callable[[str], None]) -> None:
    """Fetches the model and writes it to `target`, a new folder; says what takes long.

    Raises:
        ModelUnavailable: it cannot be had here; one line that says why and what to do.
        OSError: the disk is full, or the folder may not be written.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelUnavailable("smollm2 needs the package gguf: pip install gguf==0.19.0")
    with whole_folder(target) as draft, smollm2_gguf(target.parent, say) as file:
        say(f"converting it into {target}")
        write_checkpoint(file, draft)
        path = draft / "generation_config.json"
        path.write_text(json.dumps(GENERATION_CONFIG, indent=2) + "\n")
