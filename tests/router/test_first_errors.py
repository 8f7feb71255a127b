"""Bodies that are wrong in very many places."""

from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.testclient import TestClient
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

from router.first_errors import MAX_ERRORS, SMALL, is_small, stop_at_first_errors


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()

    @app.post("/responses")
    async def _responses(request: ResponsesRequest) -> int:
        return len(request.input)

    @app.post("/chat")
    async def _chat(request: ChatCompletionRequest) -> int:
        return len(request.messages)

    @app.post("/completions")
    async def _completions(request: CompletionRequest) -> int:
        return len(request.prompt or "")

    @app.exception_handler(RequestValidationError)
    async def _told(_: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse([str(each["msg"]) for each in error.errors()], 400)

    stop_at_first_errors(app)
    return TestClient(app)


MANY = 5_000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param("/responses", {"input": [{}] * MANY}, id="input-of-nothing"),
        pytest.param("/responses", {"input": [1] * MANY}, id="input-of-numbers"),
        pytest.param(
            "/responses",
            {"input": [{"role": "user", "content": [{}] * MANY}]},
            id="content-of-nothing",
        ),
        pytest.param("/chat", {"messages": [1] * MANY}, id="messages-of-numbers"),
        pytest.param("/completions", {"prompt": [1] * MANY + ["a"]}, id="mixed-prompt"),
    ],
)
def test_a_list_ends_with_its_first_wrong_element(
    client: TestClient, path: str, body: dict[str, Any]
) -> None:
    answer = client.post(path, json={"model": "demo", **body})
    assert answer.status_code == 400
    assert 0 < len(answer.json()) < MAX_ERRORS


def test_of_very_many_errors_their_number_is_told(client: TestClient) -> None:
    biases = {f"a{number}": "x" for number in range(MANY)}
    answer = client.post("/completions", json={"prompt": "a", "logit_bias": biases})
    assert answer.json() == [f"The body has {MANY} errors"]


def test_of_a_small_body_every_error_is_told(client: TestClient) -> None:
    body = {"model": "demo", "input": [{}] * 3}
    with pytest.raises(ValidationError) as every:
        ResponsesRequest.model_validate(body)
    assert len(client.post("/responses", json=body).json()) == every.value.error_count()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        pytest.param({"a": [1] * (SMALL - 1)}, True, id="at-the-limit"),
        pytest.param([1] * (SMALL + 1), False, id="many"),
        pytest.param([[1] * 10] * 10, False, id="many-deeper"),
        pytest.param({"a": {"b": {str(number): 1 for number in range(SMALL)}}}, False, id="fields"),
    ],
)
def test_elements_are_counted_on_all_levels(body: object, expected: bool) -> None:
    assert is_small(body) == expected


def test_what_is_right_is_taken(client: TestClient) -> None:
    messages = [{"role": "user", "content": "a"}] * 100
    assert client.post("/chat", json={"messages": messages}).json() == 100
    assert client.post("/completions", json={"prompt": [1, 2, 3]}).json() == 3
    assert client.post("/responses", json={"input": messages}).json() == 100


def test_a_field_that_is_wrong_is_named(client: TestClient) -> None:
    answer = client.post("/completions", json={"prompt": "a", "max_tokens": "many"})
    assert answer.json() == [
        "Input should be a valid integer, unable to parse string as an integer"
    ]
