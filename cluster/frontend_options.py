"""Which options of vLLM's API server a router can be given, and whether vLLM would take them.

Owns the list of those that have no effect in a router, and what to set instead. The rest is asked
of vLLM: the types of its arguments, its registries, and its checks of them together.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import pydantic
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import _compile_jinja_template
from vllm.exceptions import VLLMValidationError
from vllm.reasoning import ReasoningParserManager
from vllm.renderers.chat_utils import load_chat_template
from vllm.tool_parsers import ToolParserManager

from cluster.engine_values import check_registered
from cluster.errors import ConfigError
from cluster.parsing import did_you_mean, one_line, shown
from engine.arguments import option_types
from router.frontend import frontend_args, frontend_types, frontend_value, takes_texts
from router.settings import FrontendSettings

_TLS = "HAProxy speaks plain HTTP here; let what stands before it end TLS"
_ACCESS_LOG = "Serve writes it; set logging_config of the application instead"
_NO_SERVER = "Serve and HAProxy are the server, vLLM's own does not run"
_WITHOUT_EFFECT = {
    "api_server_count": "set router.replicas instead",
    "data_parallel_supervisor_port": _NO_SERVER,
    "disable_access_log_for_endpoints": _ACCESS_LOG,
    "disable_uvicorn_access_log": _ACCESS_LOG,
    "dp_supervisor_probe_failure_threshold": _NO_SERVER,
    "dp_supervisor_probe_interval_s": _NO_SERVER,
    "dp_supervisor_probe_timeout_s": _NO_SERVER,
    "enable_flash_late_interaction": "pdserve serves models that generate text",
    "enable_per_request_metrics": "a request has two engines; /metrics has the sums",
    "enable_ssl_refresh": _TLS,
    "grpc_port": _NO_SERVER,
    "h11_max_header_count": _NO_SERVER,
    "h11_max_incomplete_event_size": "set router.max_body_mib instead",
    "host": "set http_options.host instead",
    "lora_modules": "the router cannot load adapters",
    "port": "set http_options.port instead",
    "root_path": "set http_options.root_path instead",
    "ssl_ca_certs": _TLS,
    "ssl_cert_reqs": _TLS,
    "ssl_certfile": _TLS,
    "ssl_ciphers": _TLS,
    "ssl_keyfile": _TLS,
    "tokens_only": "the router speaks the whole API",
    "uds": "set http_options.host and port instead",
    "uvicorn_log_level": "set logging_config of the application instead",
}
_KEY = re.compile(r"[!-~]+")
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+")
_IMPORT_PATH = re.compile(r"\w+(\.\w+)+")


def check_frontend(options: Mapping[str, Any], engine: Mapping[str, Any]) -> None:
    """Refuses what vLLM's server does not have or take, or what has no effect in a router.

    `engine` are the options of the engine that the router stands in front of.

    Raises:
        ConfigError: one line that names the option and what it may be.
    """
    known = frontend_types()
    for name, value in options.items():
        path = f"router.frontend.{shown(name)}"
        if name in _WITHOUT_EFFECT:
            raise ConfigError(f"{path}: may not be set here: {_WITHOUT_EFFECT[name]}")
        if name in option_types():
            raise ConfigError(f"{path}: is an option of the engine; set engine.{name} instead")
        if name not in known:
            hint = did_you_mean(name.replace("-", "_"), known.keys() - _WITHOUT_EFFECT.keys())
            raise ConfigError(f"{path}: vLLM's server has no such option; {hint}")
        try:
            taken = frontend_value(value, known[name])
        except pydantic.ValidationError as error:
            if takes_texts(known[name]) and not isinstance(value, list):
                told = f"{path}: {shown(repr(value))} is not a text or a list of texts"
                raise ConfigError(told) from None
            depth = 0 if isinstance(value, Mapping | list) else None
            raise ConfigError(one_line(error, section=path, skip=depth)) from None
        if taken is not None:
            _check_value(path, name, taken)
    _check_together(options, engine)


def _check_value(path: str, name: str, value: Any) -> None:
    if name == "api_key" and not (value and all(map(_KEY.fullmatch, value))):
        # vLLM would leave an empty key out, and with it the question for one.
        raise ConfigError(f"{path}: must be a key, or a list of keys, that a header can carry")
    if name == "allowed_origins" and not all(map(_ORIGIN.fullmatch, value)):
        raise ConfigError(f"{path}: {shown(repr(value))} is not * or origins like https://a.b")
    if name == "middleware" and not all(map(_IMPORT_PATH.fullmatch, value)):
        raise ConfigError(f"{path}: {shown(repr(value))} is not import paths like module.name")
    if name == "tool_call_parser":
        check_registered(path, value, ToolParserManager.list_registered())
    if name == "chat_template":
        try:
            # As vLLM's renderer does before the first chat.
            _compile_jinja_template(load_chat_template(value))
        except (OSError, ValueError, VLLMValidationError, TemplateError) as error:
            raise ConfigError(f"{path}: {error}") from None


def _check_together(options: Mapping[str, Any], engine: Mapping[str, Any]) -> None:
    settings = FrontendSettings(
        # Any model will do, and one that nobody has to look for.
        model=os.curdir,
        served_name="model",
        options={name: value for name, value in engine.items() if name != "tokenizer"},
        frontend=options,
    )
    try:
        frontend_args(settings)
    except (KeyError, OSError, TypeError, ValueError, VLLMValidationError) as error:
        # vLLM names its arguments as on its command line.
        text = re.sub(
            r"--([a-z][a-z-]*)", lambda flag: flag[1].replace("-", "_"), str(error.args[0])
        )
        raise ConfigError(f"router.frontend: {text.removeprefix('Error: ')}") from None


def import_plugins(options: Mapping[str, Any], engine: Mapping[str, Any]) -> None:
    """Lets parsers of the user's own register, as the router will.

    Raises:
        ConfigError: there is no such file.
    """
    for path, file, manager in (
        ("router.frontend.tool_parser_plugin", options.get("tool_parser_plugin"),
         ToolParserManager.import_tool_parser),
        ("engine.reasoning_parser_plugin", engine.get("reasoning_parser_plugin"),
         ReasoningParserManager.import_reasoning_parser),
    ):  # fmt: skip
        if isinstance(file, str) and file:
            if not os.path.isfile(file):
                raise ConfigError(f"{path}: {shown(repr(file))} is not a file on this machine")
            manager(file)
