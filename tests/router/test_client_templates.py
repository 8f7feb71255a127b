"""Chat templates of clients, rendered in the sandbox for vLLM's own renderer."""

from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.renderers.hf import HfRenderer
from vllm.renderers.params import ChatParams
from vllm.tokenizers import cached_tokenizer_from_config

from engine.arguments import engine_args
from engine.models import resolve_model
from router.client_templates import ClientTemplates
from router.sandbox.limits import TaskLimits, Work
from router.sandbox.process import SandboxProcess
from router.sandbox.queue import Sandbox

pytestmark = pytest.mark.asyncio(loop_scope="session")

MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "ü"}]
SHOUT = "{% for m in messages %}{{ m.content | upper }}{{ tail }}{% endfor %}"
OF_SERVER = "{{ messages[0].content }}"
RANGE = "{% for i in range(99999) %}"


@pytest.fixture(scope="module")
def config() -> VllmConfig:
    return engine_args(resolve_model("demo"), {}).create_engine_config()


class Recording:
    """The sandbox, and what it is asked for."""

    def __init__(self, zygote: SandboxProcess) -> None:
        self.tasks: list[str] = []
        self._sandbox = Sandbox(zygote, TaskLimits(cpu_s=0.5, memory_bytes=64 * 2**20))

    async def run(self, work: Work, payload: bytes) -> bytes:
        self.tasks.append(work.task)
        return await self._sandbox.run(work, payload)


@pytest.fixture
def sandbox(zygote: SandboxProcess) -> Recording:
    return Recording(zygote)


def plain_renderer(config: VllmConfig) -> HfRenderer:
    return HfRenderer(config, cached_tokenizer_from_config(config.model_config))


@pytest.fixture
def renderer(config: VllmConfig, sandbox: Recording) -> HfRenderer:
    renderer = plain_renderer(config)
    ClientTemplates(renderer, OF_SERVER, sandbox).install()
    return renderer


def chat(template: str | None, **kwargs: Any) -> ChatParams:
    return ChatParams(
        chat_template=template,
        chat_template_content_format="auto",
        chat_template_kwargs={"tokenize": False, **kwargs},
    )


async def test_the_prompt_is_that_of_vllm(
    config: VllmConfig,
    sandbox: Recording,
    renderer: HfRenderer,
) -> None:
    for params in (chat(SHOUT, tail="!"), chat("{{ messages | length }}"), chat(SHOUT)):
        plain = await plain_renderer(config).render_messages_async(MESSAGES, params)
        assert await renderer.render_messages_async(MESSAGES, params) == plain
    assert sandbox.tasks.count("render") == 3


async def test_the_time_that_vllm_gives_its_own_thread_does_not_count(
    renderer: HfRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CHAT_TEMPLATE_RENDER_TIMEOUT", "0.000001")
    _, prompt = await renderer.render_messages_async(MESSAGES, chat(SHOUT))
    assert prompt["prompt"] == "HELLOÜ"


async def test_a_template_in_its_arguments_is_one_too(
    sandbox: Recording, renderer: HfRenderer
) -> None:
    _, prompt = await renderer.render_messages_async(MESSAGES, chat(None, chat_template=SHOUT))
    assert prompt["prompt"] == "HELLOÜ"
    assert sandbox.tasks == ["render"]


async def test_how_it_takes_contents_is_asked_once(
    sandbox: Recording, renderer: HfRenderer
) -> None:
    params = chat(
        "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}x{% endfor %}"
    )
    for _ in range(2):
        _, prompt = await renderer.render_messages_async(MESSAGES, params)
        assert prompt["prompt"] == "Helloxüx"
    assert sandbox.tasks == ["content_format", "render", "render"]


@pytest.mark.parametrize("template", [None, OF_SERVER])
async def test_the_servers_own_template_is_rendered_as_before(
    sandbox: Recording, renderer: HfRenderer, template: str | None
) -> None:
    await renderer.render_messages_async(MESSAGES, chat(template))
    assert sandbox.tasks == []


@pytest.mark.parametrize(
    ("template", "message"),
    [
        pytest.param(
            RANGE * 3 + "{% endfor %}" * 3,
            "the chat template takes longer than 0.5 s to render",
            id="time",
        ),
        pytest.param(
            "{{ 'x' * 999999999 }}", "the chat template takes more than 64 MiB", id="memory"
        ),
        pytest.param("{% if %}", "Expected an expression", id="syntax"),
        pytest.param("{{ raise_exception('not so') }}", "not so", id="its-own-error"),
        pytest.param("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "", id="deep"),
        pytest.param("{{ messages.__class__.mro() }}", "unsafe", id="unsafe"),
    ],
)
async def test_what_cannot_be_rendered_is_refused(
    renderer: HfRenderer, zygote: SandboxProcess, template: str, message: str
) -> None:
    pid = zygote.pid
    with pytest.raises(VLLMValidationError) as caught:
        await renderer.render_messages_async(MESSAGES, chat(template))
    assert message in str(caught.value)
    assert len(str(caught.value)) > 0
    assert zygote.pid == pid
