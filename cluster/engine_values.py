"""What vLLM says of the values of engine options, before it has a model or a GPU.

Owns the way to each option's own validator: vLLM builds config objects of its arguments, and those
are asked. What only the model or the node can tell, vLLM tells when it starts.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Collection, Mapping
from functools import cache
from typing import Any

import pydantic
from vllm import AsyncEngineArgs
from vllm import config as vllm_config
from vllm.config.model import ModelImpl, TokenizerMode
from vllm.config.parallel import DistributedExecutorBackend
from vllm.config.speculative import DSparkModelTypes, MTPModelTypes

from cluster.errors import ConfigError
from cluster.parsing import one_line, parse_model, shown

_RENAMED = {
    "attention_backend": ("AttentionConfig", "backend"),
    "kv_cache_dtype": ("CacheConfig", "cache_dtype"),
    "limit_mm_per_prompt": ("MultiModalConfig", "limit_per_prompt"),
    "lora_target_modules": ("LoRAConfig", "target_modules"),
}
"""Engine options that have another name in the config object which they become a field of."""

_FIRST_OWNERS = ("MultiModalConfig", "ModelConfig", "SchedulerConfig", "CacheConfig")
"""Where several config objects have a field of that name; SpeculativeConfig's are the draft's."""


_LEAST = {
    "kv_cache_memory_bytes": 1,
    "max_model_len": 2,  # a prompt and its answer
    "num_gpu_blocks_override": 1,
    "renderer_num_workers": 1,
}
"""Numbers that vLLM judges only where it uses them."""
_FINDS_OUT = {"max_model_len": -1}
"""Values that have vLLM find out what fits."""


def check_value(section: str, name: str, value: object, hint: Any) -> None:
    """Refuses a value that vLLM would refuse as its engine argument `name`, annotated `hint`.

    Raises:
        ConfigError: one line that names the option and what it may be.
    """
    if value is None and getattr(AsyncEngineArgs, name, ...) is None:
        return  # vLLM's own default, whatever the annotation says
    path = f"{section}.{name}"
    if _is_plain(hint):
        # Strictly: vLLM itself would take a "1" for a 1 here and stumble over it there.
        _check_type(section, name, value, hint)
    elif typing.get_origin(hint) in (dict, list, set):
        _check_type(section, name, value, hint, strict=False)
    if name == "speculative_config" and value is not None:
        _check_draft(path, value)
    elif (owner := _owner(name)) is not None:
        _check_field(path, value, *owner)
    elif not _is_plain(hint):
        _check_type(section, name, value, hint, strict=False)
    least = _LEAST.get(name)
    if least is not None and isinstance(value, int) and _FINDS_OUT.get(name) != value < least:
        raise ConfigError(f"{path}: {value} is not at least {least}")
    if name in _REGISTRIES and isinstance(value, str) and "." not in value:
        check_registered(path, value.lower(), _REGISTRIES[name]())
    if name == "reasoning_parser" and value:
        check_registered(path, str(value), _reasoning_parsers())
    elif isinstance(value, Mapping) and value.get("reasoning_parser"):
        check_registered(
            f"{path}.reasoning_parser", str(value["reasoning_parser"]), _reasoning_parsers()
        )


def check_registered(path: str, name: str, known: Collection[str]) -> None:
    """Refuses a name that is not in one of vLLM's registries."""
    if name not in known:
        names = ", ".join(sorted(known))
        raise ConfigError(f"{path}: {shown(repr(name))} is not one of {names}")


def check_together(section: str, options: Mapping[str, Any]) -> None:
    """Refuses values for the scheduler that vLLM refuses beside each other.

    Raises:
        ConfigError: one line with vLLM's reason.
    """
    own = _own_fields(vllm_config.SchedulerConfig)
    given = {name: value for name, value in options.items() if name in own and value is not None}
    # What is not set gets a value that goes with those that are.
    length = max(options.get("max_model_len") or 1, 1)
    if "max_model_len" not in options:
        length = max(length, given.get("long_prefill_token_threshold", 1))
    batched = given.get("max_num_batched_tokens", length)
    num_seqs = given.setdefault("max_num_seqs", max(batched, given.get("max_num_active_seqs", 1)))
    given.setdefault("max_num_batched_tokens", max(batched, num_seqs))
    try:
        vllm_config.SchedulerConfig.default_factory(**given, max_model_len=length)
    except pydantic.ValidationError as error:
        raise ConfigError(one_line(error, section=section)) from None


def _check_field(path: str, value: object, owner: Any, name: str) -> None:
    # Validates one field; the others are there, but empty.
    bare = object.__new__(owner)
    bare.__dict__.update(dict.fromkeys(owner.__dataclass_fields__))
    try:
        owner.__pydantic_validator__.validate_assignment(bare, name, value)
    except pydantic.ValidationError as error:
        (wrong, *_) = error.errors(include_url=False)
        if wrong["loc"][:1] == (name,):
            # Below a value that has no parts, pydantic names the types that it tried.
            depth = 1 if isinstance(value, Mapping | list) else None
            raise ConfigError(one_line(error, section=path, skip=depth)) from None
    except Exception:  # of a validator that looks at the other fields: it cannot be asked here
        return


def _check_draft(path: str, value: object) -> None:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}: {shown(repr(value))} is not a mapping")
    options = {str(name).replace("-", "_"): part for name, part in value.items()}
    speculative = vllm_config.SpeculativeConfig
    for name, part in options.items():
        if name not in speculative.__dataclass_fields__:
            raise ConfigError(f"{path}.{shown(name)}: no such field")
        _check_field(f"{path}.{name}", part, speculative, name)
    in_target = (*typing.get_args(MTPModelTypes), *typing.get_args(DSparkModelTypes))
    if options.get("model") is None and options.get("method") not in in_target:
        # Needs nothing but the options themselves.
        try:
            speculative(**options)
        except pydantic.ValidationError as error:
            raise ConfigError(one_line(error, section=path)) from None
        except ImportError as error:  # what the method needs is not installed
            raise ConfigError(f"{path}: {error}") from None


def _check_type(section: str, name: str, value: object, hint: Any, *, strict: bool = True) -> None:
    # A model of one field, so that the message comes out as for every other field.
    model = pydantic.create_model(  # type: ignore[call-overload]
        "EngineOption",
        __config__=pydantic.ConfigDict(
            strict=strict, protected_namespaces=(), arbitrary_types_allowed=True
        ),
        **{name: (hint, ...)},
    )
    parse_model(model, {name: value}, section=section)


def _is_plain(hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        inner = [part for part in typing.get_args(hint) if part is not type(None)]
        return len(inner) == 1 and _is_plain(inner[0])
    return hint in (bool, int, float, str, dict) or typing.get_origin(hint) is typing.Literal


def _owner(option: str) -> tuple[type, str] | None:
    """The config object whose field an engine option becomes, and that field's name."""
    if option in _RENAMED:
        class_name, name = _RENAMED[option]
        return getattr(vllm_config, class_name), name
    owners = [owner for owner in _config_classes() if option in _own_fields(owner)]
    return (owners[0], option) if owners else None


@cache
def _config_classes() -> tuple[type, ...]:
    names = [name for name in dir(vllm_config) if name.endswith("Config")]
    rest = [name for name in names if name not in (*_FIRST_OWNERS, "SpeculativeConfig")]
    classes: list[Any] = [getattr(vllm_config, name) for name in (*_FIRST_OWNERS, *rest)]
    return tuple(filter(dataclasses.is_dataclass, classes))


def _own_fields(owner: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(owner)}


def _reasoning_parsers() -> Collection[str]:
    from vllm.reasoning import ReasoningParserManager

    names: list[str] = ReasoningParserManager.list_registered()
    return names


def _quantizations() -> Collection[str]:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    return tuple(QUANTIZATION_METHODS)


def _load_formats() -> Collection[str]:
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER

    return tuple(_LOAD_FORMAT_TO_MODEL_LOADER)


def _config_formats() -> Collection[str]:
    from vllm.transformers_utils.config import _CONFIG_FORMAT_TO_CONFIG_PARSER

    return ("auto", *_CONFIG_FORMAT_TO_CONFIG_PARSER)


def _tokenizer_modes() -> Collection[str]:
    from vllm.tokenizers.registry import TokenizerRegistry

    return {*typing.get_args(TokenizerMode), *TokenizerRegistry.tokenizers}


_REGISTRIES: Mapping[str, Callable[[], Collection[str]]] = {
    "config_format": _config_formats,
    "distributed_executor_backend": lambda: typing.get_args(DistributedExecutorBackend),
    "load_format": _load_formats,
    "model_impl": lambda: typing.get_args(ModelImpl),
    "quantization": _quantizations,
    "tokenizer_mode": _tokenizer_modes,
    "worker_cls": lambda: ("auto", "a class as module.name"),
}
"""Options whose annotation is any text, and the names that vLLM has for them."""
