"""The config reference: a Markdown table of every field, made from the pydantic models.

Owns the generated part of a page between its two markers, and nothing else of the page.
"""

import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.config import ClusterConfig
from cluster.errors import ClusterError

CONFIG = "config-reference"
METRICS = "metrics-reference"
"""Names of the generated parts. Those of metrics are `cluster.metrics_reference`'s."""


def config_reference() -> str:
    """The table, one line per field in the order of the models."""
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    return "\n".join([*lines, *_rows(ClusterConfig, "")])


def replace_part(text: str, name: str, part: str) -> str:
    """`text` with what stands between the markers of a part made anew.

    Raises:
        ClusterError: the markers are missing.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ClusterError(f"no {begin} and {end} to write the reference between")
    return f"{before}{begin}\n{part}\n{end}{after}"


def write_part(path: Path, name: str, part: str) -> None:
    """Makes a part of a Markdown file anew; raises as `replace_part` does."""
    text = path.read_text(encoding="utf-8")
    path.write_text(replace_part(text, name, part), encoding="utf-8")


def _rows(model: type[BaseModel], prefix: str) -> Iterator[str]:
    told: dict[type[BaseModel], str] = {}
    for name, field in model.model_fields.items():
        hint = _unless_none(field.annotation)
        if not (isinstance(hint, type) and issubclass(hint, BaseModel)):
            cells = (f"`{prefix}{name}`", _type(hint), _default(field), field.description or "")
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        elif hint in told:
            yield f"| `{prefix}{name}.*` | | | The same fields as `{told[hint]}.*`. |"
        else:
            told[hint] = f"{prefix}{name}"
            yield from _rows(hint, f"{prefix}{name}.")


def _unless_none(hint: Any) -> Any:
    """A section that may be left out is described as one that is there."""
    section, *others = typing.get_args(hint) or (hint,)
    is_section = isinstance(section, type) and issubclass(section, BaseModel)
    return section if is_section and others == [type(None)] else hint


def _type(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(part) for part in inner if part is not type(None))
    if origin is typing.Annotated:
        return _type(inner[0])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin is dict:
        return "mapping"
    if origin is tuple:
        return "list"
    return {int: "whole number", float: "number", str: "text", bool: "true or false"}[hint]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "unset"
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is None:
        return "unset"
    if isinstance(default, tuple):
        return f"`[{', '.join(map(str, default))}]`"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"
