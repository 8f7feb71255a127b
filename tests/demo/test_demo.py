"""The demo as it ships: what it prints, what it answers, and what a kill does to it.

Its model has trained weights, in bfloat16, as users' models do. The answers are greedy.
"""

import asyncio
import json
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import psutil
import pytest
from answers import CHAT, ask
from demo_servers import MODEL, READY, Demo, demo_and_plain
from metrics import scrape, total
from ties import GREEDY, unlike

from benchmarks.chaos_processes import find_members
from kvtransfer.phase import Phase

ENDED_WITHIN_S = 900.0
"""Far more than it takes: only what never ends is a failure."""
POLL_S = 0.2
LONG = "The river began in the mountains and ran past seven old mills to the sea. " * 100
"""About 1,800 tokens, several blocks of the KV cache."""
CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "country": {"enum": ["France", "Japan", "Peru"]},
    },
    "required": ["city", "country"],
    "additionalProperties": False,
}


def chat(question: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"model": MODEL, "messages": messages, "max_tokens": 40} | GREEDY | fields


BODIES = {
    "chat": chat("What is the capital of France?"),
    "chat-streamed": chat(
        "Name three animals.", stream=True, stream_options={"include_usage": True}
    ),
    "turns": chat("")
    | {
        "messages": [
            {"role": "system", "content": "You answer in one short sentence."},
            {"role": "user", "content": "What is ice?"},
            {"role": "assistant", "content": "Ice is frozen water."},
            {"role": "user", "content": "And steam?"},
        ]
    },
    "long-prompt": chat(f"{LONG} How many mills were there?", max_tokens=12),
    "json-schema": chat(
        "Name a city and its country.",
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "city", "schema": CITY, "strict": True},
        },
    ),
    "stop-string": chat("What is the capital of France?", stop=["Paris"]),
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    with demo_and_plain(tmp_path_factory.mktemp("demo")) as demo:
        yield demo


def text_of(answer: dict[str, Any]) -> str:
    choice = answer["choices"][0]
    return str((choice.get("message") or choice.get("delta"))["content"])


def test_what_it_says_to_try_is_answered_sensibly(demo: Demo) -> None:
    assert READY in demo.cluster.log.read_text()
    done = subprocess.run(demo.command, capture_output=True, text=True, check=True)
    assert text_of(json.loads(done.stdout)) == "The capital of Japan is Tokyo."


async def test_the_official_client(demo: Demo) -> None:
    async with openai.AsyncOpenAI(base_url=f"{demo.cluster.url}/v1", api_key="none") as client:
        assert [model.id async for model in client.models.list()] == [MODEL]
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "What is the capital of Japan?"}],
            max_tokens=20,
            stream=True,
        )
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "Tokyo" in "".join(pieces)
    assert len(pieces) > 3


@pytest.mark.parametrize("name", BODIES)
async def test_it_answers_as_one_plain_server(
    client: httpx.AsyncClient, demo: Demo, name: str
) -> None:
    expected = await ask(client, demo.plain.url, CHAT, BODIES[name])
    actual = await ask(client, demo.cluster.url, CHAT, BODIES[name])
    assert not (lines := unlike(expected, actual)), "\n".join(lines)
    if name == "json-schema":
        assert json.loads(text_of(actual)).keys() == {"city", "country"}


async def written(client: httpx.AsyncClient, demo: Demo) -> None:
    """Waits until decode writes an answer."""
    async with asyncio.timeout(ENDED_WITHIN_S):
        while not await num_decoding(client, demo):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(POLL_S)


async def num_decoding(client: httpx.AsyncClient, demo: Demo) -> float:
    return total(await scrape(client, demo.cluster.url), "pdserve_inflight", phase="decoding")


async def healthy(client: httpx.AsyncClient, demo: Demo) -> dict[str, Any]:
    """Waits until the cluster is whole, and returns what it says of its health."""
    async with asyncio.timeout(ENDED_WITHIN_S):
        while True:
            answer = await client.get(f"{demo.cluster.url}/health")
            if answer.status_code == 200:
                health: dict[str, Any] = answer.json()
                return health
            await asyncio.sleep(POLL_S)


async def told(demo: Demo, line: str) -> None:
    """`pdserve up` says it as well; it looks every few seconds."""
    async with asyncio.timeout(ENDED_WITHIN_S):
        while line not in demo.cluster.log.read_text():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(POLL_S)


def killed(demo: Demo, pool: Phase) -> None:
    """Kills the engine of a pool's only replica."""
    (member,) = find_members(demo.cluster.process)[pool]
    assert member.engine_pid is not None
    psutil.Process(member.engine_pid).kill()


@pytest.mark.parametrize("pool", ["decode", "prefill"])
async def test_an_answer_goes_on_after_its_engine_was_killed(
    client: httpx.AsyncClient, demo: Demo, pool: Phase
) -> None:
    """In the midst of a stream; and the cluster is whole again, and says what happened."""
    body = chat("Tell me a story about a river.", max_tokens=60, stream=True)
    expected = await ask(client, demo.plain.url, CHAT, body)
    asked = asyncio.create_task(ask(client, demo.cluster.url, CHAT, body))
    await written(client, demo)
    killed(demo, pool)
    late = asyncio.create_task(ask(client, demo.cluster.url, CHAT, body))
    async with asyncio.timeout(ENDED_WITHIN_S):
        for answer in (await asked, await late):
            assert not (lines := unlike(expected, answer)), "\n".join(lines)
    health = await healthy(client, demo)
    said = f"{pool} replica"
    assert health["last_engine_end"]["cause"] == "SIGKILL"
    assert health["last_engine_end"]["message"].startswith(said)
    samples = await scrape(client, demo.cluster.url)
    assert total(samples, "pdserve_engine_ends_total", pool=pool, cause="SIGKILL") == 1
    await told(demo, f"an engine has ended: {said}")
