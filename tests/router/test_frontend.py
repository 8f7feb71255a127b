"""What becomes of the options of vLLM's API server, and of its middlewares."""

import dataclasses
import logging
from collections.abc import Iterator
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from engine.models import resolve_model
from router.api_keys import OPEN_PATHS
from router.app import TASKS, layered
from router.errors import RouterInternalsChanged
from router.frontend import frontend_args
from router.health import Health
from router.pairs import Pairs
from router.refusals import Refusal
from router.route_note import NOTE
from router.settings import FrontendSettings, RequestLimits


def settings(options: dict[str, Any], **frontend: Any) -> FrontendSettings:
    return FrontendSettings(
        model=resolve_model("demo"), served_name="demo", options=options, frontend=frontend
    )


def test_the_reasoning_parser_is_where_the_front_end_looks_for_it() -> None:
    args = frontend_args(settings({"reasoning_parser": "qwen3"}))
    assert args.structured_outputs_config.reasoning_parser == "qwen3"


def test_nested_options_are_objects_of_vllm() -> None:
    options = {"structured_outputs_config": {"backend": "xgrammar"}, "reasoning_parser": "qwen3"}
    args = frontend_args(settings(options))
    assert args.structured_outputs_config.backend == "xgrammar"
    assert args.structured_outputs_config.reasoning_parser == "qwen3"


@pytest.mark.parametrize("name", ["api_key", "allowed_origins", "middleware"])
def test_one_text_is_a_list_of_one(name: str) -> None:
    assert getattr(frontend_args(settings({}, **{name: "https://a.b"})), name) == ["https://a.b"]
    assert getattr(frontend_args(settings({}, **{name: ["a", "b"]})), name) == ["a", "b"]


def test_what_is_not_set_has_the_default_of_vllm() -> None:
    args = frontend_args(settings({}))
    assert (args.api_key, args.allowed_origins, args.middleware) == (None, [], [])
    assert args.served_model_name == ["demo"]


@pytest.mark.parametrize(
    ("options", "frontend"),
    [
        ({}, {"api_key": 123}),
        ({}, {"enable_auto_tool_choice": True}),
        ({}, {"enable_auto_tool_choice": True, "tool_call_parser": "nope"}),
        ({"reasoning_parser": "nope"}, {}),
        ({}, {"chat_template": "/no/such/file"}),
    ],
)
def test_what_vllm_refuses_is_refused_before_an_app_is_made(
    options: dict[str, Any], frontend: dict[str, Any]
) -> None:
    with pytest.raises(Exception, match=r"list|parser|exist"):
        frontend_args(settings(options, **frontend))


@pytest.fixture(autouse=True)
def _level_of_logs() -> Iterator[None]:
    # Making vLLM's app raises it for everybody.
    level = logging.root.level
    yield
    logging.root.setLevel(level)


def client_of(app: FastAPI, **limits: Any) -> TestClient:
    limited = dataclasses.replace(settings({}), limits=RequestLimits(**limits))
    return TestClient(layered(app, limited))


def app_with(**frontend: Any) -> FastAPI:
    app: FastAPI = build_app(frontend_args(settings({}, **frontend)), TASKS, None)

    @app.post("/v1/echo")
    async def echo(body: dict[str, Any]) -> dict[str, Any]:
        if body.get("busy"):
            note = NOTE.get()
            assert note is not None
            note.refusal = Refusal(
                status=HTTPStatus.TOO_MANY_REQUESTS, message="busy", retry_after_s=1
            )
        return body

    return app


@pytest.mark.parametrize(
    ("status", "body", "headers"),
    [
        pytest.param(200, {}, {}, id="answer"),
        pytest.param(429, {"busy": True}, {}, id="refused"),
        pytest.param(413, {"text": "x" * 200}, {}, id="too-large"),
        pytest.param(400, {"n": 5000}, {}, id="too-many"),
        pytest.param(431, {}, {"x": "y" * 100_000}, id="headers-too-large"),
        pytest.param(401, {}, {"Authorization": "Bearer wrong"}, id="wrong-key"),
        pytest.param(404, {}, {}, id="no-such-path"),
    ],
)
def test_every_answer_has_the_cors_header(
    status: int, body: dict[str, Any], headers: dict[str, str]
) -> None:
    app = app_with(allowed_origins=["https://a.b"], api_key="key")
    path = "/v1/none" if status == 404 else "/v1/echo"
    sent = {"Authorization": "Bearer key", "Origin": "https://a.b", **headers}
    answer = client_of(app, max_body_bytes=100).post(path, json=body, headers=sent)
    assert answer.status_code == status
    assert answer.headers["access-control-allow-origin"] == "https://a.b"
    assert answer.headers.get_list("vary") == ["Origin"]


def test_without_origins_no_answer_has_it() -> None:
    answer = client_of(app_with()).post("/v1/echo", json={}, headers={"Origin": "https://a.b"})
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


def test_a_browser_may_ask_first() -> None:
    asks = {"Origin": "https://a.b", "Access-Control-Request-Method": "POST"}
    app = app_with(allowed_origins="https://a.b", api_key="key")
    answer = client_of(app).options("/v1/echo", headers=asks)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://a.b"


def routes(app: FastAPI) -> Iterator[tuple[str, str]]:
    for route in app.routes:
        for method in sorted(getattr(route, "methods", None) or ()):
            yield method, route.path  # type: ignore[attr-defined]


def test_a_key_is_needed_for_all_that_does_anything() -> None:
    app = app_with(api_key=["key", "other"])
    client = client_of(app)
    every = {*routes(app), ("GET", "/no-such-page"), ("POST", "/no-such-page")}
    assert len(every) > 30
    without = {
        (method, path)
        for method, path in every
        if path not in OPEN_PATHS and client.request(method, path).status_code != 401
    }
    assert not without
    for key in ("key", "other"):
        sent = {"Authorization": f"Bearer {key}"}
        assert client.post("/v1/echo", json={}, headers=sent).status_code == 200


def test_keys_that_nobody_asks_for_do_not_start() -> None:
    app = app_with(api_key="key")
    app.user_middleware = [m for m in app.user_middleware if m.cls is not AuthenticationMiddleware]
    with pytest.raises(RouterInternalsChanged):
        client_of(app)


def test_without_keys_none_is_needed() -> None:
    assert client_of(app_with()).post("/v1/echo", json={}).status_code == 200


class Ends:
    """An engine has ended."""

    last = SimpleNamespace(exit=SimpleNamespace(cause="SIGKILL"), text="secret", at_s=1.0)
    last_fault = None


@pytest.mark.parametrize(
    ("keys", "sent", "is_told"),
    [
        pytest.param(None, {}, True, id="no-keys"),
        pytest.param("key", {}, False, id="without"),
        pytest.param("key", {"Authorization": "Bearer wrong"}, False, id="wrong"),
        pytest.param("key", {"Authorization": "Bearer key"}, True, id="with"),
    ],
)
def test_causes_are_for_those_with_a_key(
    keys: str | None, sent: dict[str, str], is_told: bool
) -> None:
    async def starting() -> dict[str, str]:
        return {"decode": "secret"}

    app = app_with(api_key=keys)
    app.state.engine_client = SimpleNamespace(errored=False)
    pool = SimpleNamespace(is_open=False, name="decode", ledger={})
    health = Health(
        (pool,),  # type: ignore[arg-type]
        Ends,  # type: ignore[arg-type]
        starting,
        is_served=lambda: True,
        pairs=Pairs(),
    )
    app.router.routes.insert(0, health.route())
    answer = client_of(app).get("/health", headers=sent)
    assert answer.status_code == 503
    assert answer.json()["replicas"] == {"decode": 0}
    assert ("secret" in answer.text) == is_told
