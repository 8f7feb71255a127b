"""Renders chat templates that clients send, by vLLM's functions."""

from typing import Any

from vllm.config import VllmConfig
from vllm.renderers import hf


class Templates:
    """Owns nothing."""

    def __init__(self, config: VllmConfig, tokenizer: Any) -> None:
        self._model_config = config.model_config
        self._tokenizer = tokenizer

    def content_format(self, asked: dict[str, Any]) -> str:
        """How the template takes a message's content: as one string or as parts."""
        found: str = hf._resolve_chat_template_content_format(
            asked["chat_template"],
            asked["tools"],
            self._tokenizer,
            model_config=self._model_config,
        )
        return found

    def render(self, asked: dict[str, Any]) -> str | list[int]:
        """The prompt that the template makes of a conversation."""
        prompt: str | list[int] = hf.safe_apply_chat_template(
            self._model_config, self._tokenizer, **asked
        )
        return prompt
