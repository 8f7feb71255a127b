"""What becomes of the options of vLLM's API server, and of its CORS middleware."""

import logging
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from starlette.types import ASGIApp
from vllm.entrypoints.launchers.app import build_app

from engine.models import resolve_model
from router.admission import WaitsForReplicas
from router.answers import NOTE, Refusal, TellsRoute
from router.app import TASKS, take_cors
from router.frontend import frontend_args
from router.limits import BodyLimit
from router.settings import FrontendSettings


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


def guarded(app: FastAPI, *, ready: bool) -> ASGIApp:
    async def wait() -> None:
        if not ready:
            raise TimeoutError

    cors = take_cors(app)
    return cors(BodyLimit(WaitsForReplicas(TellsRoute(app), wait, 1.0), 100))


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
    ("status", "ready", "body", "headers"),
    [
        pytest.param(200, True, {}, {}, id="answer"),
        pytest.param(429, True, {"busy": True}, {}, id="refused"),
        pytest.param(413, True, {"text": "x" * 200}, {}, id="too-large"),
        pytest.param(503, False, {}, {}, id="no-replica"),
        pytest.param(401, True, {}, {"Authorization": "Bearer wrong"}, id="wrong-key"),
        pytest.param(404, True, {}, {}, id="no-such-path"),
    ],
)
def test_every_answer_has_the_cors_header(
    status: int, ready: bool, body: dict[str, Any], headers: dict[str, str]
) -> None:
    app = app_with(allowed_origins=["https://a.b"], api_key="key")
    path = "/v1/none" if status == 404 else "/v1/echo"
    sent = {"Authorization": "Bearer key", "Origin": "https://a.b", **headers}
    answer = TestClient(guarded(app, ready=ready)).post(path, json=body, headers=sent)
    assert answer.status_code == status
    assert answer.headers["access-control-allow-origin"] == "https://a.b"
    assert answer.headers.get_list("vary") == ["Origin"]


def test_without_origins_no_answer_has_it() -> None:
    client = TestClient(guarded(app_with(), ready=True))
    answer = client.post("/v1/echo", json={}, headers={"Origin": "https://a.b"})
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


def test_a_browser_may_ask_first() -> None:
    asks = {"Origin": "https://a.b", "Access-Control-Request-Method": "POST"}
    app = app_with(allowed_origins="https://a.b", api_key="key")
    answer = TestClient(guarded(app, ready=False)).options("/v1/echo", headers=asks)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://a.b"
