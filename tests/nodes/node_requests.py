"""What these tests ask of a cluster, and what they look for in a router's metrics.

Owns the requests. What must come of them is the business of the tests.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from answers import COMPLETIONS, ask
from cases import Case, token_prompt
from metrics import Sample, scrape, total
from servers import await_line, new_client, plain_server

NUM_PROMPT = 480
PROMPTS = ("crosses", "killed", "silent", "prefill cut off", "prefill back", "gone", "after")
"""What the requests are for."""
LONG = ("crosses", "prefill back")
WITHIN_S = 240.0
"""For what must happen in the end: engines start again, Ray is sure that a node is dead."""
LOOK_S = 0.02
"""Much less than a long answer takes."""


def body(name: str) -> dict[str, Any]:
    """A long prompt, so that its KV is seen on the wire, or a short one with a long answer."""
    num_prompt, num_answer = (NUM_PROMPT, 20) if name in LONG else (60, 400)
    fields = {
        "prompt": token_prompt(num_prompt, seed=PROMPTS.index(name)),
        "max_tokens": num_answer,
        "ignore_eos": True,
    }
    return Case(name=name, endpoint=COMPLETIONS, fields=fields).body(stream=True)


async def one_engines_answers(log: Path) -> dict[str, Any]:
    """A plain vLLM server's to each of the requests."""
    with plain_server(log) as plain:
        await_line(plain, "Application startup complete")
        async with new_client() as client:
            return {name: await ask(client, plain.url, COMPLETIONS, body(name)) for name in PROMPTS}


async def answered(url: str, name: str) -> dict[str, Any]:
    async with asyncio.timeout(WITHIN_S), new_client() as client:
        return await ask(client, url, COMPLETIONS, body(name))


async def seen(
    client: httpx.AsyncClient, url: str, condition: Callable[[list[Sample]], bool]
) -> list[Sample]:
    """The first look at the router's metrics that meets a condition."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            if condition(samples := await scrape(client, url)):
                return samples
            await asyncio.sleep(LOOK_S)


def is_decoding(samples: list[Sample]) -> bool:
    return total(samples, "pdserve_inflight", phase="decoding") == 1


def are_paired(samples: list[Sample]) -> bool:
    """Whether both pools have a replica, and these can exchange KV."""
    ready = [total(samples, "pdserve_replicas", pool=pool) for pool in ("prefill", "decode")]
    return ready == [1, 1] and total(samples, "pdserve_unready_pairs") == 0


def num_faults(samples: list[Sample], *faults: str) -> float:
    return sum(total(samples, "pdserve_faults_total", fault=fault) for fault in faults)
