"""Which options of vLLM's API server are refused, and which are not."""

from pathlib import Path
from typing import Any

import pytest

from cluster.config import parse_args
from cluster.engine_options import check_engine_options
from cluster.errors import MAX_LINE, ConfigError

WRONG = [
    ("misspelt", {"chat-template": "x"},
     ".chat-template: vLLM's server has no such option; did you mean chat_template?"),
    ("newline", {"a\nb": 1}, ".a\\nb: vLLM's server has no such option"),
    ("engine-option", {"reasoning_parser": "qwen3"},
     ".reasoning_parser: is an option of the engine; set engine.reasoning_parser instead"),
    ("port", {"port": 1}, ".port: may not be set here: set http_options.port instead"),
    ("host", {"host": "::"}, ".host: may not be set here: set http_options.host instead"),
    ("uds", {"uds": "/tmp/x"}, ".uds: may not be set here: set http_options.host and port instead"),
    ("root", {"root_path": "/a"}, ".root_path: may not be set here: set http_options.root_path"),
    ("tls", {"ssl_certfile": "a"}, ".ssl_certfile: may not be set here: HAProxy speaks plain HTTP"),
    ("access-log", {"disable_uvicorn_access_log": True},
     ".disable_uvicorn_access_log: may not be set here: Serve writes it"),
    ("h11", {"h11_max_header_count": 9}, ".h11_max_header_count: may not be set here"),
    ("adapters", {"lora_modules": [{"name": "a", "path": "b"}]},
     ".lora_modules: may not be set here: the router cannot load adapters"),
    ("metrics", {"enable_per_request_metrics": True},
     ".enable_per_request_metrics: may not be set here"),
    ("key-number", {"api_key": 123}, ".api_key: 123 is not a text or a list of texts"),
    ("key-numbers", {"api_key": [123]}, ".api_key.0: 123 is not a text"),
    ("key-empty", {"api_key": ""}, ".api_key: must be a key, or a list of keys, that a header can"),
    ("key-none", {"api_key": []}, ".api_key: must be a key, or a list of keys"),
    ("key-newline", {"api_key": ["a", "b\n"]}, ".api_key: must be a key, or a list of keys"),
    ("origin-slash", {"allowed_origins": ["https://a.b/"]},
     ".allowed_origins: ['https://a.b/'] is not * or origins like https://a.b"),
    ("origin-name", {"allowed_origins": "a.b"}, ".allowed_origins: ['a.b'] is not * or origins"),
    ("origin-number", {"allowed_origins": 1},
     ".allowed_origins: 1 is not a text or a list of texts"),
    ("middleware", {"middleware": "nodot"},
     ".middleware: ['nodot'] is not import paths like module.name"),
    ("tool-parser", {"tool_call_parser": "nope"}, ".tool_call_parser: 'nope' is not one of"),
    ("tool-plugin", {"tool_parser_plugin": "/no/such.py"},
     ".tool_parser_plugin: '/no/such.py' is not a file on this machine"),
    ("tools-alone", {"enable_auto_tool_choice": True},
     ": enable_auto_tool_choice requires tool_call_parser"),
    ("tools-text", {"enable_auto_tool_choice": "yes"},
     ".enable_auto_tool_choice: 'yes' is not true or false"),
    ("template", {"chat_template": "/no/such/file"}, ".chat_template: The supplied chat template"),
    ("template-empty", {"chat_template": ""}, ".chat_template: "),
    ("template-folder", {"chat_template": "/tmp"}, ".chat_template: "),
    ("template-syntax", {"chat_template": "{% if %}"}, ".chat_template: "),
    ("template-kwargs", {"default_chat_template_kwargs": "x"},
     ".default_chat_template_kwargs: 'x' is not a mapping"),
    ("outputs-alone", {"enable_log_outputs": True},
     ": enable_log_outputs requires enable_log_requests"),
    ("keep-alive", {"sse_keep_alive_interval": -1}, ": sse_keep_alive_interval must be"),
    ("fingerprint", {"fingerprint_mode": "x"},
     ".fingerprint_mode: 'x' is not one of full, hash, custom, none"),
]  # fmt: skip


def check(frontend: dict[str, Any], **engine: Any) -> None:
    check_engine_options(parse_args({"engine": engine, "router": {"frontend": frontend}}))


@pytest.mark.parametrize(
    ("options", "line"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG]
)
def test_an_option_that_is_refused(options: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(options)
    assert str(caught.value).startswith(f"router.frontend{line}")
    assert len(str(caught.value)) <= MAX_LINE


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"api_key": "secret"}, id="one-key"),
        pytest.param({"api_key": ["a", "b"]}, id="keys"),
        pytest.param({"api_key": None}, id="no-key"),
        pytest.param({"allowed_origins": "https://a.b"}, id="one-origin"),
        pytest.param({"allowed_origins": ["*"]}, id="any-origin"),
        pytest.param({"middleware": "module.name"}, id="one-middleware"),
        pytest.param({"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}, id="tools"),
        pytest.param({"chat_template": "{{ messages }}"}, id="template"),
        pytest.param({"default_chat_template_kwargs": {"enable_thinking": False}}, id="kwargs"),
    ],
)
def test_an_option_that_is_taken(options: dict[str, Any]) -> None:
    check(options)


def test_an_option_that_needs_one_of_the_engine() -> None:
    check({"enable_log_outputs": True}, enable_log_requests=True)


def test_a_template_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text("{{ messages }}")
    check({"chat_template": str(path)})
