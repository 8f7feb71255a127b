"""When a client leaves, or an answer ends early, both engines are free of the request at once."""

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from answers import CHAT, COMPLETIONS, ask
from cases import EOS_TOKEN_ID, PROMPT, Case, token_prompt
from metrics import Sample, scrape, total
from servers import DECODE, PREFILL, Server

FREE_WITHIN_S = 1.0
REPORT_S = 0.5
"""Replicas tell a changed load every quarter of a second; then it takes a scrape to see it."""

GAUGES = (
    "pdserve_replica_running",
    "pdserve_replica_waiting",
    "pdserve_replica_kv_usage_fraction",
)
POLL_S = 0.02

streamed = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


class Watch:
    """What the cluster's engines hold, as its metrics tell."""

    def __init__(self, client: httpx.AsyncClient, cluster: Server) -> None:
        self._client = client
        self._cluster = cluster

    async def until(self, condition: Callable[[list[Sample]], bool], within_s: float) -> None:
        deadline_s = time.monotonic() + within_s
        while not condition(samples := await scrape(self._client, self._cluster.url)):
            held = [sample for sample in samples if sample.name in GAUGES and sample.value]
            assert time.monotonic() < deadline_s, held
            await asyncio.sleep(POLL_S)

    async def busy(self, pool: str) -> None:
        """Returns once the pool's engine works on something."""
        await self.until(lambda samples: held(samples, pool) > 0, within_s=20)

    async def free(self) -> None:
        """Both engines are free of every request, and the router knows of none."""
        await self.until(is_free, within_s=FREE_WITHIN_S + REPORT_S)


def held(samples: list[Sample], pool: str) -> float:
    return sum(total(samples, name, pool=pool) for name in GAUGES)


def is_free(samples: list[Sample]) -> bool:
    pools = held(samples, PREFILL) + held(samples, DECODE)
    return pools == 0 and total(samples, "pdserve_inflight") == 0


@pytest.fixture
async def watch(client: httpx.AsyncClient, cluster: Server) -> Watch:
    watch = Watch(client, cluster)
    await watch.until(is_free, within_s=30)  # of what a test that failed has left
    return watch


def long_answer(index: int = 0, prompt_tokens: int = 100, **fields: Any) -> dict[str, Any]:
    prompt = token_prompt(prompt_tokens, seed=1000 + index)
    common = {"prompt": prompt, "max_tokens": 512 - prompt_tokens, "ignore_eos": True}
    return Case(name="", endpoint=COMPLETIONS, fields=common | fields).body()


async def leave(*requests: "asyncio.Task[Any]") -> None:
    """Closes the connections of requests, some of which still run, however slow we are."""
    running = [request for request in requests if not request.done()]
    assert running
    for request in running:
        request.cancel()
    await asyncio.wait(requests)


@streamed
async def test_during_prefill(
    client: httpx.AsyncClient, cluster: Server, watch: Watch, stream: bool
) -> None:
    """So many long prompts that most still wait when their clients go."""
    # Prompts that no test before has left in the prefix cache.
    seeds = range(100 if stream else 200, 160 if stream else 260)
    bodies = [long_answer(seed, prompt_tokens=480, stream=stream) for seed in seeds]
    requests = [asyncio.create_task(ask(client, cluster.url, COMPLETIONS, body)) for body in bodies]
    await watch.busy(PREFILL)
    await leave(*requests)
    await watch.free()


@streamed
@pytest.mark.parametrize("num_requests", [1, 20])
async def test_during_decode(
    client: httpx.AsyncClient, cluster: Server, watch: Watch, num_requests: int, stream: bool
) -> None:
    bodies = [long_answer(index, stream=stream) for index in range(num_requests)]
    requests = [asyncio.create_task(ask(client, cluster.url, COMPLETIONS, body)) for body in bodies]
    await watch.busy(DECODE)
    await leave(*requests)
    await watch.free()


@pytest.mark.parametrize("num_tokens", [1, 2, 10])
async def test_after_some_tokens(
    client: httpx.AsyncClient, cluster: Server, watch: Watch, num_tokens: int
) -> None:
    body = long_answer(stream=True)
    async with client.stream("POST", cluster.url + COMPLETIONS, json=body) as response:
        lines = response.aiter_lines()
        for _ in range(num_tokens):
            async for line in lines:
                if line.startswith("data: "):
                    break
    await watch.free()


async def test_at_any_moment(client: httpx.AsyncClient, cluster: Server, watch: Watch) -> None:
    chosen = random.Random(0)
    for index in range(10):
        body = long_answer(index, prompt_tokens=400, stream=bool(index % 2))
        for _ in range(3):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(chosen.uniform(0, 0.15)):
                    await ask(client, cluster.url, COMPLETIONS, body)
    await watch.free()


async def test_others_are_not_touched(
    client: httpx.AsyncClient, cluster: Server, watch: Watch
) -> None:
    stays = long_answer(max_tokens=60)
    expected = await ask(client, cluster.url, COMPLETIONS, stays)
    requests = [
        asyncio.create_task(ask(client, cluster.url, COMPLETIONS, long_answer(index)))
        for index in range(1, 5)
    ]
    staying = asyncio.create_task(ask(client, cluster.url, COMPLETIONS, stays))
    await watch.busy(DECODE)
    await leave(*requests)
    assert await staying == expected
    await watch.free()


@pytest.mark.parametrize("endpoint", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"max_tokens": 1}, id="one-token"),
        pytest.param({"max_tokens": 1, "n": 3, "temperature": 1.0}, id="one-token-n-3"),
        pytest.param({"logit_bias": {str(EOS_TOKEN_ID): 100.0}}, id="end-of-sequence"),
        pytest.param({"allowed_token_ids": [300], "stop_token_ids": [300]}, id="stop-token"),
    ],
)
@streamed
async def test_ended_at_the_first_token(
    client: httpx.AsyncClient,
    cluster: Server,
    watch: Watch,
    *,
    endpoint: str,
    fields: dict[str, Any],
    stream: bool,
) -> None:
    text = {"prompt": PROMPT} if endpoint == COMPLETIONS else {"messages": [user(PROMPT)]}
    body = Case(name="", endpoint=endpoint, fields=text | {"max_tokens": 50} | fields)
    answer = await ask(client, cluster.url, endpoint, body.body(stream=stream))
    assert len(answer["choices"][0]["token_ids"]) == 1
    await watch.free()


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@streamed
async def test_stop_string_in_the_first_token(
    client: httpx.AsyncClient, cluster: Server, watch: Watch, stream: bool
) -> None:
    """Only the router can see it, when prefill has handed over already."""
    one = Case(name="", endpoint=COMPLETIONS, fields={"prompt": PROMPT, "max_tokens": 1})
    first = (await ask(client, cluster.url, COMPLETIONS, one.body()))["choices"][0]["text"]
    body = one.body(stream=stream) | {"max_tokens": 50, "stop": [first]}
    for _ in range(5):
        answer = await ask(client, cluster.url, COMPLETIONS, body)
        assert answer["choices"][0]["stop_reason"] == first
    await watch.free()


async def test_half_of_a_connection_is_as_good_as_none(
    cluster: Server, plain: Server, watch: Watch
) -> None:
    """As with the plain server: who has closed its side does not wait for an answer."""
    for server in (plain, cluster):
        address = httpx.URL(server.url)
        body = json.dumps(long_answer(stream=True)).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await reader.readuntil(b"data: ")
        writer.write_eof()
        assert b"[DONE]" not in await reader.read()
        writer.close()
    await watch.free()


async def test_serves_headers_end_nothing(
    client: httpx.AsyncClient, cluster: Server, watch: Watch
) -> None:
    headers = {"X-Request-Timeout-Seconds": "0.01"}
    answer = await client.post(cluster.url + COMPLETIONS, json=long_answer(), headers=headers)
    assert answer.status_code == 200
    await watch.free()
