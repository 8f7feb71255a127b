"""Values made from a schema are values that the schema's own model takes."""

import random
from typing import Annotated, Any, Literal

import pytest
from fastapi import FastAPI
from pydantic import BaseModel, Field, TypeAdapter

from benchmarks.fuzz.schema import Api, Route


class Inner(BaseModel):
    kind: Literal["a", "b"]
    weights: dict[str, float] = {}
    next: "Inner | None" = None


class Outer(BaseModel):
    words: Annotated[list[str], Field(min_length=1, max_length=4)]
    share: Annotated[float, Field(ge=0, le=1)]
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] = 0
    salt: Annotated[str, Field(min_length=1, max_length=5)] = "a"
    inner: Inner | None = None
    either: int | list[Inner] | bool = 0
    order: Literal["up"] = "up"


@pytest.fixture(scope="module")
def api() -> Api:
    """An API with one route that takes a body, and one that does not."""
    app = FastAPI()

    @app.post("/ask")
    def ask(body: Outer) -> None: ...

    @app.get("/look/{name}")
    def look(name: str) -> None: ...

    return Api(app.openapi())


def test_routes(api: Api) -> None:
    assert {(route.method, route.path, route.body is None) for route in api.routes} == {
        ("POST", "/ask", False),
        ("GET", "/look/{name}", True),
    }


def test_values_are_allowed(api: Api) -> None:
    (route,) = api.with_body
    rng = random.Random(1)
    made = [api.value(rng, route.body or {}) for _ in range(500)]
    for value in made:
        Outer.model_validate(value, strict=True)
    assert {name for value in made for name in value} == set(Outer.model_fields)


def test_fields(api: Api) -> None:
    (route,) = api.with_body
    assert set(api.fields(random.Random(1), route)) == set(Outer.model_fields)


def test_a_body_of_several_forms() -> None:
    schema: dict[str, Any] = TypeAdapter(int | str).json_schema()
    route = Route(method="POST", path="/", body=schema)
    assert Api({"paths": {}}).fields(random.Random(1), route) == {}
