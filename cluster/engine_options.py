"""Which engine options vLLM has, and what the plain ones among them may be.

Owns the comparison of a config's `engine` sections with vLLM's own arguments; it needs vLLM, but no
GPU. Values that only vLLM can judge (nested configs, what a model supports) are left to it.
"""

import types
import typing
from collections.abc import Mapping
from typing import Any

import pydantic

from cluster.config import POOLS, ClusterConfig
from cluster.errors import ConfigError
from cluster.parsing import did_you_mean, parse_model


def check_engine_options(config: ClusterConfig) -> None:
    """Refuses options that vLLM does not have, and plain values of the wrong type.

    Raises:
        ConfigError: one line that names the option and what it may be.
    """
    sections = {
        "engine": config.engine,
        **{f"{name}.engine": config.pool(name).engine for name in POOLS},
    }
    if config.router.frontend:
        _check_frontend(config.router.frontend)
    if not any(sections.values()):
        return  # spares the seconds that importing vLLM takes
    known = _vllm_options()
    for section, options in sections.items():
        for name, value in options.items():
            if name not in known:
                hint = did_you_mean(name.replace("-", "_"), known)
                raise ConfigError(f"{section}.{name}: vLLM has no such engine option; {hint}")
            if _is_plain(known[name]):
                _check_value(section, {name: value}, known[name])


def _check_frontend(options: Mapping[str, Any]) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments = vars(make_arg_parser(FlexibleArgumentParser()).parse_args([]))
    known = arguments.keys() - _vllm_options().keys()
    for name in options:
        if name not in known:
            hint = did_you_mean(name.replace("-", "_"), known)
            raise ConfigError(f"router.frontend.{name}: vLLM's server has no such option; {hint}")


def _vllm_options() -> Mapping[str, Any]:
    import dataclasses

    from vllm.config.quantization import QuantizationConfigArgs
    from vllm.engine.arg_utils import AsyncEngineArgs

    # The one annotation that vLLM imports for type checkers only.
    names = {"QuantizationConfigArgs": QuantizationConfigArgs}
    hints = typing.get_type_hints(AsyncEngineArgs, localns=names)
    return {field.name: hints[field.name] for field in dataclasses.fields(AsyncEngineArgs)}


def _is_plain(hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        return len(inner) == 1 and _is_plain(inner[0])
    return hint in (bool, int, float, str) or typing.get_origin(hint) is typing.Literal


def _check_value(section: str, option: Mapping[str, Any], hint: Any) -> None:
    (name,) = option
    # A model of one field, so that the message comes out as for every other field.
    model = pydantic.create_model(  # type: ignore[call-overload]
        "EngineOption",
        __config__=pydantic.ConfigDict(strict=True, protected_namespaces=()),
        **{name: (hint, ...)},
    )
    parse_model(model, option, section=section)
