"""A request that is wrong in many places is told of the first ones only.

pydantic collects every error of a body, and FastAPI makes a dictionary of each. Of a list of 1,600
empty objects, 5 kB, the models of the Responses API find 370,000: seconds in the router's loop, and
a gigabyte. Here a list ends with its first wrong element. Owns nothing; changes an app's routes.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.dependencies.utils import get_flat_dependant
from fastapi.routing import APIRoute
from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError, SchemaValidator

from router.errors import RouterInternalsChanged

MAX_ERRORS = 1000
"""Of one body, that are told one by one; the union of all kinds of input has some hundreds."""

_LISTS = frozenset({"list", "set", "frozenset", "tuple"})


def stop_at_first_errors(app: FastAPI) -> None:
    """To be called once all routes are there.

    Raises:
        RouterInternalsChanged: this FastAPI keeps the models of bodies elsewhere.
    """
    for route in app.routes:
        if isinstance(route, APIRoute):
            for field in get_flat_dependant(route.dependant).body_params:
                adapter = getattr(field, "_type_adapter", None)
                if not hasattr(adapter, "core_schema") or not hasattr(adapter, "validator"):
                    raise RouterInternalsChanged(
                        "fastapi's ModelField has no _type_adapter with a core_schema and a "
                        "validator: see the pinned versions"
                    )
                _end_lists_early(adapter.core_schema, seen=set())
                adapter.validator = _FirstErrors(SchemaValidator(adapter.core_schema))


class _FirstErrors:
    """A validator that tells of many errors only how many they are."""

    def __init__(self, validator: SchemaValidator) -> None:
        self._validator = validator

    def validate_python(self, *args: Any, **options: Any) -> Any:
        try:
            return self._validator.validate_python(*args, **options)
        except ValidationError as error:
            if (num := error.error_count()) <= MAX_ERRORS:
                raise
            told = PydanticCustomError("too_many_errors", "The body has {num} errors", {"num": num})
            # Of whose input nothing is kept: it is what there is too much of.
            details = InitErrorDetails(type=told, loc=(), input=None)
            raise ValidationError.from_exception_data(error.title, [details]) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._validator, name)


def _end_lists_early(schema: Any, *, seen: set[int]) -> None:
    """In a core schema of pydantic's, in place."""
    if id(schema) in seen:
        return
    seen.add(id(schema))
    if isinstance(schema, dict):
        kind = schema.get("type")
        # A dictionary of fields may have one that is called so.
        if isinstance(kind, str) and kind in _LISTS:
            schema["fail_fast"] = True
        for each in schema.values():
            _end_lists_early(each, seen=seen)
    elif isinstance(schema, list | tuple):
        for each in schema:
            _end_lists_early(each, seen=seen)
