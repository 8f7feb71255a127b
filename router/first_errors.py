"""A large body that is wrong in many places is told of the first ones only.

pydantic collects every error of a body, and FastAPI makes a dictionary of each. Of a list of 1,600
empty objects, 5 kB, the models of the Responses API find 370,000: seconds in the router's loop, and
a gigabyte. Here a list ends with its first wrong element. Of a small body every error is told, as
vLLM's own server does. Owns nothing; changes an app's routes.
"""

from itertools import islice
from typing import Any

from fastapi import FastAPI
from fastapi.dependencies.utils import get_flat_dependant
from fastapi.routing import APIRoute
from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError, SchemaValidator

from router.errors import RouterInternalsChanged

MAX_ERRORS = 1000
"""Of one body, that are told one by one; the union of all kinds of input has some hundreds."""

SMALL = 100
"""Elements of a body in which every error is told."""
_LISTS = frozenset({"list", "set", "frozenset", "tuple"})


def stop_at_first_errors(app: FastAPI) -> None:
    """To be called once all routes are there.

    Raises:
        RouterInternalsChanged: this FastAPI keeps the models of bodies elsewhere.
    """
    for route in app.routes:
        if isinstance(route, APIRoute):
            for field in get_flat_dependant(route.dependant).body_params:
                adapter: Any = getattr(field, "_type_adapter", None)
                if not hasattr(adapter, "core_schema") or not hasattr(adapter, "validator"):
                    raise RouterInternalsChanged(
                        "fastapi's ModelField has no _type_adapter with a core_schema and a "
                        "validator: see the pinned versions"
                    )
                first = SchemaValidator(_ending_lists_early(adapter.core_schema, {}))
                adapter.validator = _FirstErrors(first, adapter.validator)


class _FirstErrors:
    """A validator that tells of many errors only how many they are."""

    def __init__(self, first: SchemaValidator, every: SchemaValidator) -> None:
        """They find the first error of a list, and every one."""
        self._first = first
        self._every = every

    def validate_python(self, body: Any, **options: Any) -> Any:
        try:
            return self._first.validate_python(body, **options)
        except ValidationError as error:
            if is_small(body):
                return self._every.validate_python(body, **options)
            if (num := error.error_count()) <= MAX_ERRORS:
                raise
            told = PydanticCustomError("too_many_errors", "The body has {num} errors", {"num": num})
            # Of whose input nothing is kept: it is what there is too much of.
            details = InitErrorDetails(type=told, loc=(), input=None)
            raise ValidationError.from_exception_data(error.title, [details]) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._every, name)


def is_small(body: object) -> bool:
    """Whether so few elements are in it, on all levels."""
    left, num = [body], 0
    while left and num <= SMALL:
        value = left.pop()
        if isinstance(value, list | dict):
            num += len(value)
            left += islice(value.values() if isinstance(value, dict) else value, SMALL)
    return num <= SMALL


def _ending_lists_early(schema: Any, made: dict[int, Any]) -> Any:
    """A copy of a core schema of pydantic's; `made` are those of its parts, by their identity."""
    if id(schema) in made:
        return made[id(schema)]
    if isinstance(schema, dict):
        copy: dict[Any, Any] = {}
        made[id(schema)] = copy
        for name, each in schema.items():
            copy[name] = _ending_lists_early(each, made)
        kind = schema.get("type")
        # A dictionary of fields may have one that is called so.
        if isinstance(kind, str) and kind in _LISTS:
            copy["fail_fast"] = True
        return copy
    if isinstance(schema, list | tuple):
        return type(schema)(_ending_lists_early(each, made) for each in schema)
    return schema
