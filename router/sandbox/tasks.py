"""What children do, on vLLM's own code. Imported by the zygote only: it loads vLLM and a tokenizer.

Each task takes and gives what JSON has.
"""

from collections.abc import Mapping
from typing import Any

from vllm.tokenizers import cached_tokenizer_from_config

from router.frontend_config import front_end_config
from router.sandbox.child import Task
from router.sandbox.grammars import Grammars
from router.sandbox.templates import Templates


def prepare(model: str, options: Mapping[str, Any]) -> Mapping[str, Task]:
    """Loads what children need, so that they find it loaded."""
    config = front_end_config(model, options)
    tokenizer = cached_tokenizer_from_config(model_config=config.model_config)
    grammars = Grammars(config, tokenizer)
    templates = Templates(config, tokenizer)
    grammars.warm_up()
    return {
        "compile": grammars.compile,
        "content_format": templates.content_format,
        "render": templates.render,
    }
