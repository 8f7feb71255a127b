"""Values against a pydantic model, and a wrong one told in one line that names the field.

Owns the words; knows no model.
"""

import difflib
import re
from collections.abc import Iterable
from typing import TypeVar

import pydantic
from pydantic import BaseModel

from cluster.errors import ConfigError, printable, shortened

Model = TypeVar("Model", bound=BaseModel)

MAX_VALUE = 60
"""Characters of a value, or of a key, in a message or a report."""


def shown(value: object) -> str:
    """A value or a key as it may stand in a line: escaped, and not long."""
    return shortened(printable(value if isinstance(value, str) else repr(value)), MAX_VALUE)


def parse_model(
    model: type[Model], values: object, *, section: str = "", strict: bool | None = None
) -> Model:
    """Validates `values`, the content of `section`; `strict` takes no value of another type.

    Raises:
        ConfigError: one line about the first wrong value.
    """
    try:
        return model.model_validate(values, strict=strict)
    except pydantic.ValidationError as error:
        raise ConfigError(one_line(error, section=section, model=model)) from None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all if few."""
    names = sorted(known)
    nearest = difflib.get_close_matches(name[:MAX_VALUE], names, n=1)
    if nearest:
        return f"did you mean {nearest[0]}?"
    return f"known are {', '.join(names)}" if len(names) <= 12 else "no known name is near it"


_IN_BRACKETS = re.compile(r"[a-z]*\[.+\]")
"""In pydantic's path to a value: "[key]" after a mapping's key, and types that it tried."""

_EXPECTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dataclass_type": "a mapping",
    "dict_type": "a mapping",
    "enum": "one of {expected}",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "list_type": "a list",
    "literal_error": "one of {expected}",
    "model_type": "a mapping",
    "string_too_short": "a non-empty text",
    "string_type": "a text",
    "too_short": "a list of at least {min_length}",
    "tuple_type": "a list",
}
"""What a field may be, by pydantic's type of error; completes "'x' is not ..."."""


def one_line(
    error: pydantic.ValidationError,
    *,
    section: str = "",
    skip: int | None = 0,
    model: type[BaseModel] | None = None,
) -> str:
    """The first wrong value in `section`: its field, and what it may be.

    `skip` leaves out the beginning of pydantic's own path, or with None all of it, where `section`
    says it already; of `model` the fields are named that a misspelt one may have meant.
    """
    first = error.errors(include_url=False)[0]
    context = dict(first.get("ctx", {}))
    inner = [str(part) for part in (first["loc"][skip:] if skip is not None else ())]
    location = [section, *(shown(part) for part in inner if not _IN_BRACKETS.fullmatch(part))]
    path = ".".join(part for part in location if part)
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        *parents, name = (str(part) for part in first["loc"])
        hint = f"; {did_you_mean(name, _fields(model, parents))}" if model else ""
        return f"{path}: no such field{hint}"
    if first["type"] == "value_error":
        reason = str(context["error"])
    elif first["type"] in _EXPECTED:
        if "expected" in context:
            context["expected"] = context["expected"].replace("'", "").replace(" or ", ", ")
        reason = (
            f"{shown(repr(first['input']))} is not {_EXPECTED[first['type']].format(**context)}"
        )
    else:
        reason = first["msg"][0].lower() + first["msg"][1:]
    return " ".join((f"{path}: {reason}" if path else reason).split())


def _fields(model: type[BaseModel], path: Iterable[str]) -> list[str]:
    for name in path:
        inner = model.model_fields[name].annotation
        assert isinstance(inner, type), name
        assert issubclass(inner, BaseModel), name
        model = inner
    return list(model.model_fields)
