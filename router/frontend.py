"""The arguments of vLLM's API server: which a config may set, and what becomes of them.

Owns the way from a config to vLLM's own namespace of arguments. Never makes an app.
"""

import dataclasses
import typing
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter
from vllm.entrypoints.launchers.cli_args import (
    FrontendArgs,
    make_arg_parser,
    validate_parsed_serve_args,
)
from vllm.entrypoints.launchers.launcher import validate_api_server_args
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser

from router.frontend_config import front_end_args
from router.settings import FrontendSettings


def frontend_types() -> Mapping[str, Any]:
    """vLLM's front-end arguments by name, with their annotated types."""
    return typing.get_type_hints(FrontendArgs)


def frontend_args(settings: FrontendSettings) -> Namespace:
    """vLLM's server arguments with their defaults, and ours where they differ.

    Raises:
        ValueError, TypeError, KeyError: vLLM's own checks of its server's arguments.
    """
    engine = front_end_args(settings.model, settings.options)
    args: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    # The config with the reasoning parser in it, which is where the front end looks for it.
    engine.create_structured_outputs_config()
    for field in dataclasses.fields(engine):
        setattr(args, field.name, getattr(engine, field.name))
    types = frontend_types()
    for name, value in settings.frontend.items():
        setattr(args, name, frontend_value(value, types[name]))
    args.model = settings.model
    args.served_model_name = [settings.served_name]
    args.disable_log_stats = True
    validate_parsed_serve_args(args)
    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
    validate_api_server_args(args)
    return args


def frontend_value(value: Any, hint: Any) -> Any:
    """A value as vLLM wants it for an argument of this type: one text for a list of one.

    Raises:
        pydantic.ValidationError: it is of another type.
    """
    if isinstance(value, str) and takes_texts(hint):
        value = [value]
    adapter: TypeAdapter[Any] = TypeAdapter(hint)
    # Strictly, but for a mapping that stands for an object of vLLM's.
    return adapter.validate_python(value, strict=not _has_objects(hint))


def takes_texts(hint: Any) -> bool:
    """Whether an argument of this type is a list of texts."""
    return list[str] in (hint, *typing.get_args(hint))


def _has_objects(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint) or any(map(_has_objects, typing.get_args(hint)))
