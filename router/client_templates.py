"""Chat templates that clients send, where the operator lets them, are rendered in the sandbox.

A template is a program. vLLM parses it in the router's loop and runs it in the one thread that
renders for everybody, where nothing can stop it.
"""

import json
from collections.abc import Awaitable
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.renderers import hf
from vllm.renderers.params import ChatParams

from router.errors import SandboxUnavailable, TaskRefused
from router.grammar_check import Runs
from router.sandbox.limits import Work

PARSE, RENDER = (
    Work(task=task, subject="the chat template", verb="render", participle="rendered")
    for task in ("content_format", "render")
)


IS_OF_CLIENT: ContextVar[bool] = ContextVar("pdserve_template_is_of_client", default=False)
"""Whether the chat that is rendered in this context has a template of its own."""


class ClientTemplates:
    """Put between vLLM's renderer and its own ways. Owns nothing but these."""

    def __init__(self, renderer: hf.HfRenderer, server_template: str | None, sandbox: Runs) -> None:
        self._renderer = renderer
        self._server_template = server_template
        self._sandbox = sandbox
        self._render_messages = renderer.render_messages_async
        self._apply = renderer._apply_chat_template_async
        self._in_time = renderer._render_with_timeout

    def install(self) -> None:
        self._renderer.render_messages_async = self._with_known_format
        self._renderer._apply_chat_template_async = self._apply_where_safe
        self._renderer._render_with_timeout = self._in_time_of_its_own

    async def _with_known_format(self, messages: list[Any], params: ChatParams) -> Any:
        templates = {params.chat_template, params.chat_template_kwargs.get("chat_template")}
        if templates <= {None, self._server_template}:
            return await self._render_messages(messages, params)
        token = IS_OF_CLIENT.set(True)
        try:
            if params.chat_template is not None:
                await self._learn_format(params)
            return await self._render_messages(messages, params)
        finally:
            IS_OF_CLIENT.reset(token)

    async def _learn_format(self, params: ChatParams) -> None:
        """Tells vLLM what it would parse the template for."""
        template = params.chat_template
        tools = params.chat_template_kwargs.get("tools")
        config = self._renderer.model_config
        # As in hf._resolve_chat_template_content_format.
        key = (
            template,
            tools is None,
            self._renderer.get_tokenizer().name_or_path,
            config.revision,
            config.code_revision,
            config.trust_remote_code,
        )
        known = hf._CONTENT_FORMATS
        if key in known:
            return
        # Nothing of the tools but that there are any is looked at.
        asked = {"chat_template": template, "tools": None if tools is None else []}
        found = await self._ask(PARSE, asked)
        if len(known) >= hf._CONTENT_FORMATS_MAXSIZE:
            known.clear()
        known[key] = found

    async def _apply_where_safe(
        self, model_config: Any, tokenizer: Any, conversation: list[Any], **options: Any
    ) -> Any:
        if not IS_OF_CLIENT.get():
            return await self._apply(model_config, tokenizer, conversation, **options)
        return await self._ask(RENDER, {"conversation": conversation, **options})

    async def _in_time_of_its_own(self, rendered: Awaitable[Any]) -> Any:
        # vLLM's limit counts the time of the one thread that renders, which is not asked here.
        return await (rendered if IS_OF_CLIENT.get() else self._in_time(rendered))

    async def _ask(self, work: Work, asked: dict[str, Any]) -> Any:
        try:
            found = await self._sandbox.run(work, json.dumps(asked).encode())
        except TaskRefused as refused:
            raise VLLMValidationError(refused.message, parameter=refused.parameter) from None
        except SandboxUnavailable as error:
            raise GracefulHTTPError(str(error), HTTPStatus.SERVICE_UNAVAILABLE) from None
        return json.loads(found)
