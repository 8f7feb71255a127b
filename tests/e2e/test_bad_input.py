"""What is wrong with a request is told by the router, in OpenAI's form; no engine hears of it."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from answers import CHAT, COMPLETIONS, ask, differences
from cases import CITY_TOOL, PROMPT, VOCAB_SIZE, Case, token_prompt
from metrics import Sample, scrape, total
from servers import MAX_MODEL_LEN, MODEL, Server

MAX_BODY_BYTES = 8 * 2**20


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 4} | fields


def chat(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "What is this?"}]
    return {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 4} | fields


def schema(value: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": value}}


BAD_COMPLETIONS: dict[str, dict[str, Any]] = {
    "no-prompt": completion(prompt=None),
    "empty-prompt": completion(prompt=""),
    "empty-token-prompt": completion(prompt=[]),
    "prompt-of-wrong-type": completion(prompt={"text": "a"}),
    "prompt-too-long": completion(prompt=token_prompt(MAX_MODEL_LEN)),
    "prompt-far-too-long": completion(prompt="word " * 10_000),
    "one-of-two-prompts-too-long": completion(prompt=[[5, 6], token_prompt(MAX_MODEL_LEN)]),
    "token-id-too-big": completion(prompt=[5, VOCAB_SIZE]),
    "token-id-far-too-big": completion(prompt=[5, 2**40]),
    "token-id-negative": completion(prompt=[5, -1]),
    "max-tokens-negative": completion(max_tokens=-1),
    "max-tokens-zero": completion(max_tokens=0),
    "max-tokens-of-wrong-type": completion(max_tokens="many"),
    "min-tokens-over-max": completion(min_tokens=5),
    "temperature-negative": completion(temperature=-1),
    "temperature-of-wrong-type": completion(temperature=[]),
    "top-p-zero": completion(top_p=0),
    "top-p-over-1": completion(top_p=1.1),
    "top-k-below-minus-1": completion(top_k=-2),
    "min-p-over-1": completion(min_p=2),
    "n-zero": completion(n=0),
    "n-negative": completion(n=-1),
    "presence-penalty-too-big": completion(presence_penalty=3),
    "repetition-penalty-zero": completion(repetition_penalty=0),
    "logprobs-too-many": completion(logprobs=10_000),
    "logprobs-negative": completion(logprobs=-2),
    "prompt-logprobs-too-many": completion(prompt_logprobs=10_000),
    "prompt-logprobs-streamed": completion(prompt_logprobs=1, stream=True),
    "logit-bias-out-of-vocabulary": completion(logit_bias={str(VOCAB_SIZE): 1.0}),
    "logit-bias-of-no-token": completion(logit_bias={"word": 1.0}),
    "allowed-token-out-of-vocabulary": completion(allowed_token_ids=[VOCAB_SIZE]),
    "allowed-tokens-empty": completion(allowed_token_ids=[]),
    "stop-token-of-wrong-type": completion(stop_token_ids=["a"]),
    "stop-empty": completion(stop=[""]),
    "bad-word-empty": completion(bad_words=[""]),
    "stream-options-without-stream": completion(stream_options={"include_usage": True}),
    "bad-schema": completion(response_format=schema({"type": "no such type"})),
    "schema-missing": completion(response_format={"type": "json_schema"}),
    "schema-of-wrong-type": completion(response_format=schema("text")),
    "bad-regex": completion(structured_outputs={"regex": "(["}),
    "bad-grammar": completion(structured_outputs={"grammar": "root ::= nothing"}),
    "choice-empty": completion(structured_outputs={"choice": []}),
    "two-structures": completion(structured_outputs={"choice": ["a"], "regex": "a"}),
    "unknown-model": completion(model="no such model"),
    "prompt-too-long-streamed": completion(prompt=token_prompt(MAX_MODEL_LEN), stream=True),
}

BAD_CHATS: dict[str, dict[str, Any]] = {
    "no-messages": chat(messages=None),
    "messages-of-wrong-type": chat(messages="hello"),
    "message-without-role": chat(messages=[{"content": "a"}]),
    "content-of-wrong-type": chat(messages=[{"role": "user", "content": 5}]),
    "prompt-too-long": chat(messages=[{"role": "user", "content": "word " * 2000}]),
    "max-tokens-negative": chat(max_tokens=-1),
    "top-logprobs-without-logprobs": chat(top_logprobs=3),
    "top-logprobs-too-many": chat(logprobs=True, top_logprobs=10_000),
    "bad-schema": chat(response_format=schema({"type": "no such type"})),
    "unknown-tool": chat(
        tools=[CITY_TOOL], tool_choice={"type": "function", "function": {"name": "none"}}
    ),
    "tool-choice-without-tools": chat(tool_choice="required"),
    "unknown-model": chat(model="no such model"),
}

BAD_BODIES: dict[str, bytes] = {
    "malformed": b'{"model": "demo", "prompt": ',
    "not-an-object": b"[]",
    "number": b"5",
    "empty": b"",
    "not-a-number": b'{"model": "demo", "prompt": "a", "temperature": NaN, "max_tokens": -1}',
}


def bad_requests() -> Iterator[Any]:
    for endpoint, table in ((COMPLETIONS, BAD_COMPLETIONS), (CHAT, BAD_CHATS)):
        for name, body in table.items():
            content = json.dumps(body).encode()
            yield pytest.param(endpoint, content, id=f"{endpoint.split('/')[2]}-{name}")
    for name, content in BAD_BODIES.items():
        yield pytest.param(COMPLETIONS, content, id=f"body-{name}")


@pytest.fixture
async def no_engine_asked(client: httpx.AsyncClient, cluster: Server) -> AsyncIterator[None]:
    """Asserts that no request reached an engine, and that the cluster still answers afterwards."""
    before = num_routed(await scrape(client, cluster.url))
    yield
    assert num_routed(await scrape(client, cluster.url)) == before
    await ask(client, cluster.url, COMPLETIONS, completion())


def num_routed(samples: list[Sample]) -> float:
    return total(samples, "pdserve_routes_total")


@pytest.mark.usefixtures("no_engine_asked")
@pytest.mark.parametrize(("endpoint", "content"), bad_requests())
async def test_refused_as_by_the_plain_server(
    client: httpx.AsyncClient, cluster: Server, plain: Server, endpoint: str, content: bytes
) -> None:
    headers = {"Content-Type": "application/json"}
    expected = await client.post(plain.url + endpoint, content=content, headers=headers)
    actual = await client.post(cluster.url + endpoint, content=content, headers=headers)
    assert (actual.status_code, actual.json()) == (expected.status_code, expected.json())
    assert actual.status_code == (404 if "no such model" in str(content) else 400)
    assert actual.json()["error"]["code"] == actual.status_code


@pytest.mark.usefixtures("no_engine_asked")
@pytest.mark.parametrize("text", [b"\xff", b"\xed\xa0\x80"], ids=["no-character", "half-of-one"])
async def test_body_that_is_not_utf_8(
    client: httpx.AsyncClient, cluster: Server, text: bytes
) -> None:
    content = b'{"model": "demo", "prompt": "a", "bad_words": ["%s"]}' % text
    headers = {"Content-Type": "application/json"}
    actual = await client.post(cluster.url + COMPLETIONS, content=content, headers=headers)
    assert actual.status_code == 400
    assert actual.json()["error"]["code"] == 400


@pytest.mark.usefixtures("no_engine_asked")
@pytest.mark.parametrize(
    "fields",
    [{"response_format": schema({"type": 1})}, {"logprobs": 10_000}],
    ids=["bad-schema", "logprobs-too-many"],
)
async def test_a_stream_that_is_refused_has_a_status(
    client: httpx.AsyncClient, cluster: Server, plain: Server, fields: dict[str, Any]
) -> None:
    """vLLM looks at these when it has answered 200 already: there the error is in the stream."""
    body = completion(stream=True, **fields)
    expected, actual = [
        await client.post(server.url + COMPLETIONS, json=body) for server in (plain, cluster)
    ]
    event, _, _ = expected.text.removeprefix("data: ").partition("\n")
    assert (expected.status_code, actual.status_code) == (200, 400)
    assert actual.json() == json.loads(event)


BEYOND_BOUNDS: dict[str, bytes] = {
    "choices": json.dumps(completion(n=1025)).encode(),
    "priority": json.dumps(completion(priority=2**63)).encode(),
    "request-id": json.dumps(completion(request_id="x" * 5_000_000)).encode(),
    "bad-words": json.dumps(completion(bad_words=[f"w{i}" for i in range(100_000)])).encode(),
    "half-a-character": b'{"model": "demo", "prompt": "a", "stop": ["\\ud800"]}',
    "depth": b'{"model": "demo", "prompt": ' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}",
}


@pytest.mark.usefixtures("no_engine_asked")
@pytest.mark.parametrize("content", BEYOND_BOUNDS.values(), ids=BEYOND_BOUNDS)
async def test_beyond_the_bounds(
    client: httpx.AsyncClient, cluster: Server, content: bytes
) -> None:
    headers = {"Content-Type": "application/json"}
    answer = await client.post(cluster.url + COMPLETIONS, content=content, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert len(answer.content) < 1000


@pytest.mark.usefixtures("no_engine_asked")
async def test_headers_beyond_the_bounds(client: httpx.AsyncClient, cluster: Server) -> None:
    answer = await client.get(f"{cluster.url}/v1/models", headers={"x": "y" * 100_000})
    assert answer.status_code == 431
    assert answer.json()["error"]["code"] == 431


async def test_headers_within_the_bounds(client: httpx.AsyncClient, cluster: Server) -> None:
    headers = {f"x-{index}": "y" * 250 for index in range(256)}
    answer = await client.post(cluster.url + COMPLETIONS, json=completion(), headers=headers)
    assert answer.status_code == 200


@pytest.mark.parametrize("name", ["X-Request-Id", "X-Session-Id", "X-Request-Timeout-Seconds"])
async def test_headers_may_have_any_bytes(
    client: httpx.AsyncClient, cluster: Server, plain: Server, name: str
) -> None:
    headers = httpx.Headers({name: "caf\xe9"}, encoding="latin-1")
    for server in (plain, cluster):
        answer = await client.post(server.url + COMPLETIONS, json=completion(), headers=headers)
        assert answer.status_code == 200


async def test_an_answer_has_the_id_that_its_client_gave(
    client: httpx.AsyncClient, cluster: Server, plain: Server
) -> None:
    by_header = {"X-Request-Id": "mine"}
    for server in (plain, cluster):
        url = server.url + COMPLETIONS
        answer = await client.post(url, json=completion(), headers=by_header)
        assert answer.json()["id"] == "cmpl-mine"
        named = await client.post(url, json=completion(request_id="mine-too"))
        assert named.json()["id"] == "cmpl-mine-too"
    assert answer.headers.get_list("x-request-id") == ["mine"]


@pytest.mark.parametrize("priority", [-(2**63), -(10**9), 2**62, 2**63 - 1])
async def test_any_priority_is_taken(
    client: httpx.AsyncClient, cluster: Server, priority: int
) -> None:
    for headers, fields in (
        ({}, {"priority": priority}),
        ({"X-Vllm-Priority": f"{priority}9"}, {}),
    ):
        body = completion(**fields)
        answer = await client.post(cluster.url + COMPLETIONS, json=body, headers=headers)
        assert answer.status_code == 200


async def test_tokens_in_tokens_out_as_by_the_plain_server(
    client: httpx.AsyncClient, cluster: Server, plain: Server
) -> None:
    body = {"model": MODEL, "token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 4}}
    path = "/inference/v1/generate"
    expected, actual = [
        (await client.post(server.url + path, json=body)).json()["choices"]
        for server in (plain, cluster)
    ]
    assert [set(choice) for choice in actual] == [set(choice) for choice in expected]
    assert [each["weight_versions"] for each in actual] == [
        each["weight_versions"] for each in expected
    ]


@pytest.mark.usefixtures("no_engine_asked")
@pytest.mark.parametrize("chunked", [False, True], ids=["declared", "chunked"])
async def test_body_over_the_limit(
    client: httpx.AsyncClient, cluster: Server, chunked: bool
) -> None:
    content = json.dumps(completion(prompt="a" * MAX_BODY_BYTES)).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(content), 2**16):
            yield content[start : start + 2**16]

    response = await client.post(
        cluster.url + COMPLETIONS, content=pieces() if chunked else content
    )
    assert response.status_code == 413
    assert response.json()["error"]["code"] == 413


@pytest.mark.parametrize(
    "fields",
    [{}, {"max_tokens": 1}, {"seed": 1, "temperature": 1}, {"prompt_logprobs": 0}],
    ids=str,
)
async def test_a_client_does_not_say_where_kv_comes_from(
    client: httpx.AsyncClient, cluster: Server, fields: dict[str, Any]
) -> None:
    elsewhere = {
        "do_remote_prefill": True,
        "do_remote_decode": True,
        "remote_engine_id": "another",
        "remote_request_id": "another",
        "remote_host": "127.0.0.1",
        "remote_port": 1,
        "remote_block_ids": [[1, 2]],
        "tp_size": 1,
    }
    body = Case(name="", endpoint=COMPLETIONS, fields=completion(**fields)).body()
    expected = await ask(client, cluster.url, COMPLETIONS, body)
    actual = await ask(client, cluster.url, COMPLETIONS, body | {"kv_transfer_params": elsewhere})
    assert not differences(expected, actual)
    assert not actual["kv_transfer_params"]
