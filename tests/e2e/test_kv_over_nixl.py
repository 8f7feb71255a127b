"""The KV cache really goes from the prefill to the decode engine, every block of it, by NIXL."""

import asyncio
import json
import math
import time
from math import ceil, prod
from pathlib import Path

import httpx
from answers import COMPLETIONS, ask
from cases import Case, token_prompt
from metrics import Sample, scrape, total
from servers import BLOCK_SIZE, Server

from engine.demo_model import MODEL_CONFIG

FLOAT32_BYTES = 4
SHAPE = ("num_hidden_layers", "num_key_value_heads", "head_dim")
BLOCK_BYTES: int = (
    FLOAT32_BYTES * BLOCK_SIZE * 2 * prod(MODEL_CONFIG[each] for each in SHAPE)  # type: ignore[misc]
)
PROMPT_LENGTHS = (1, 20, 31, 32, 33, 64, 65, 100, 300, 500)

EXPORTED_WITHIN_S = 9.0
"""Replicas hand their metrics to Ray every five seconds, which exports them every second."""
POLL_S = 0.2


class Transfers:
    """Reads the replicas' transfer metrics where Ray exports them."""

    def __init__(self, client: httpx.AsyncClient, cluster: Server) -> None:
        self._client = client
        self._urls = ray_metrics_urls(cluster)

    async def samples(self) -> list[Sample]:
        read = await asyncio.gather(*(scrape(self._client, url) for url in self._urls))
        return [sample for samples in read for sample in samples]

    async def total(self, name: str) -> float:
        return total(await self.samples(), f"ray_pdserve_kv_{name}_total")

    async def highest(self, name: str, until: float = math.inf) -> float:
        """The highest total seen while everything that has happened is told, or `until` is met.

        Ray shows a sample once, and nothing in its place until it is told it again.
        """
        highest = 0.0
        deadline_s = time.monotonic() + EXPORTED_WITHIN_S
        while highest < until and time.monotonic() < deadline_s:
            highest = max(highest, await self.total(name))
            await asyncio.sleep(POLL_S)
        return highest


def ray_metrics_urls(cluster: Server) -> list[str]:
    """Every Ray cluster lists its metrics' addresses in a file in its folder."""
    option = "--temp-dir="
    arguments = (part for each in cluster.processes(option) for part in each.cmdline())
    folder = next(part.removeprefix(option) for part in arguments if part.startswith(option))
    discovery = json.loads((Path(folder) / "prom_metrics_service_discovery.json").read_text())
    return [f"http://{target}" for group in discovery for target in group["targets"]]


async def test_bytes_moved_are_the_blocks_of_the_prompts(
    client: httpx.AsyncClient, cluster: Server
) -> None:
    transfers = Transfers(client, cluster)
    before = await transfers.highest("transfer_bytes")
    for length in PROMPT_LENGTHS:
        fields = {"prompt": token_prompt(length, seed=5), "max_tokens": 4, "ignore_eos": True}
        body = Case(name="", endpoint=COMPLETIONS, fields=fields).body()
        await ask(client, cluster.url, COMPLETIONS, body)
    num_blocks = sum(ceil(length / BLOCK_SIZE) for length in PROMPT_LENGTHS)
    expected = before + num_blocks * BLOCK_BYTES
    moved, copied, failed = await asyncio.gather(
        transfers.highest("transfer_bytes", until=expected),
        transfers.highest("transfers_copied"),
        transfers.highest("transfer_failures"),
    )
    assert (moved, copied, failed) == (expected, 0, 0)
