"""The rest of the API: health, models, metrics, and the official client."""

import httpx
import openai
import pytest
from cases import PROMPT
from metrics import scrape
from servers import MODEL, Server


async def test_health(client: httpx.AsyncClient, cluster: Server) -> None:
    assert (await client.get(f"{cluster.url}/health")).status_code == 200


async def test_models(client: httpx.AsyncClient, cluster: Server) -> None:
    (model,) = (await client.get(f"{cluster.url}/v1/models")).json()["data"]
    assert model["id"] == MODEL
    assert model["max_model_len"] == 512


@pytest.fixture
def official(cluster: Server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)


async def test_official_client_completes(official: openai.AsyncOpenAI) -> None:
    async with official:
        answer = await official.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=5, extra_body={"ignore_eos": True}
        )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    assert answer.choices[0].finish_reason == "length"


async def test_official_client_streams_chat(official: openai.AsyncOpenAI) -> None:
    async with official:
        stream = await official.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "What is this?"}],
            max_tokens=8,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        choices = [choice async for chunk in stream for choice in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices)
    assert choices[-1].finish_reason == "length"


async def test_official_client_raises_bad_request(official: openai.AsyncOpenAI) -> None:
    async with official:
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            await official.completions.create(model=MODEL, prompt=PROMPT, max_tokens=-1)


async def test_metrics(client: httpx.AsyncClient, official: openai.AsyncOpenAI) -> None:
    async with official:
        await official.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=5, extra_body={"ignore_eos": True}
        )
    samples = await scrape(client, str(official.base_url).removesuffix("/v1/"))
    counts = {sample.name: sample.value for sample in samples if not sample.labels}
    for name in ("ttft", "itl", "handover"):
        assert counts[f"pdserve_{name}_seconds_count"] > 0
    labelled = {
        (sample.name, sample.labels.get("pool") or sample.labels.get("phase"))
        for sample in samples
        if sample.value > 0
    }
    for pool in ("prefill", "decode"):
        assert ("pdserve_queue_seconds_count", pool) in labelled
        assert ("pdserve_replicas", pool) in labelled
    for phase in ("prefilling", "transferring", "decoding"):
        assert ("pdserve_phase_seconds_count", phase) in labelled
