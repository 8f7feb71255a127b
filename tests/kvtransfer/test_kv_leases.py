"""Leases that end while a decode reads: no token is made from blocks that may be another's."""

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import get_args

import pytest
import pytest_asyncio
from kv_engines import PREFILL_ONLY, Answer, Engine, running_engines
from kv_faults import FAULTY_WORKER

from engine.models import resolve_model
from kvtransfer.config import Sharing
from kvtransfer.leases import NUM_SLOTS, LeaseTable

MODULE_LOOP = pytest.mark.asyncio(loop_scope="module")

LEASE_S = 1
NUM_BLOCKS = 12
MAX_TOKENS = 1024


def test_a_lease_stands_until_it_is_ended() -> None:
    table = LeaseTable()
    table.grant(7)
    table.grant(8)
    table.end(7)
    assert list(table._slots[6:10]) == [0, 0, 8, 0]


def test_the_end_of_a_lease_leaves_a_younger_one_in_its_slot() -> None:
    table = LeaseTable()
    table.grant(7)
    table.grant(7 + NUM_SLOTS)
    table.end(7)
    assert table._slots[7] == 7 + NUM_SLOTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two engines with hardly more blocks than one request needs: freed ones are reused at once."""

    prefill: Engine
    decode: Engine

    async def plain(self, prompt: list[int], max_tokens: int) -> list[int]:
        await self.decode.core.reset_prefix_cache_async()
        answer = await self.decode.generate(prompt, max_tokens=max_tokens)
        await self.decode.core.reset_prefix_cache_async()
        return answer.token_ids

    async def prefilled(self, prompt: list[int]) -> Answer:
        return await self.prefill.generate(prompt, kv=dict(PREFILL_ONLY))

    async def lose_and_reuse_blocks(self, seed: int) -> None:
        """The lease ends and every block of prefill is written by others."""
        await self.prefill.until(lambda stats: stats.kv_cache_usage > 0, 5)
        await asyncio.sleep(LEASE_S)
        for number in range(3):
            await self.prefill.generate(random_prompt(1000, f"{seed} {number}"))

    @property
    def num_ended_leases(self) -> int:
        return sum(delta.num_ended_leases for delta in self.decode.transfers)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=get_args(Sharing))
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    async with running_engines(
        resolve_model("demo"),
        "prefill",
        "decode",
        lease_s=LEASE_S,
        shared_memory=request.param,
        max_model_len=MAX_TOKENS,
        num_gpu_blocks_override=NUM_BLOCKS,
        worker_extension_cls=FAULTY_WORKER,
    ) as engines:
        yield Pair(prefill=engines[0], decode=engines[1])


def random_prompt(num_tokens: int, seed: str) -> list[int]:
    return random.Random(seed).choices(range(4, 700), k=num_tokens)


@MODULE_LOOP
async def test_a_lease_that_holds(pair: Pair) -> None:
    prompt = random_prompt(900, "holds")
    expected = await pair.plain(prompt, 9)
    first = await pair.prefilled(prompt)
    rest = await pair.decode.generate(
        prompt + first.token_ids, max_tokens=8, kv=first.kv_transfer_params
    )
    assert first.token_ids + rest.token_ids == expected
    assert rest.prefill_stats.num_external_cached_tokens == len(prompt)
    assert pair.num_ended_leases == 0


@MODULE_LOOP
@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_a_lease_that_ended_before_the_read(pair: Pair, seed: int) -> None:
    prompt = random_prompt(900, f"before {seed}")
    expected = await pair.plain(prompt, 9)
    first = await pair.prefilled(prompt)
    await pair.lose_and_reuse_blocks(seed)
    before = (pair.num_ended_leases, pair.decode.num_bytes_read)
    rest = await pair.decode.generate(
        prompt + first.token_ids, max_tokens=8, kv=first.kv_transfer_params
    )
    assert first.token_ids + rest.token_ids == expected
    assert pair.num_ended_leases - before[0] == 1
    # It was read, and everything seemed well.
    assert pair.decode.num_bytes_read > before[1]


@MODULE_LOOP
async def test_a_lease_that_another_decode_ended(pair: Pair) -> None:
    """A decode that died after its read has freed the blocks for the one that follows it."""
    prompt = random_prompt(900, "twice")
    expected = await pair.plain(prompt, 9)
    first = await pair.prefilled(prompt)
    assert first.kv_transfer_params is not None
    before = pair.num_ended_leases
    for num_ended_leases in (0, 1):
        await pair.decode.core.reset_prefix_cache_async()
        rest = await pair.decode.generate(
            prompt + first.token_ids, max_tokens=8, kv=dict(first.kv_transfer_params)
        )
        assert first.token_ids + rest.token_ids == expected
        assert pair.num_ended_leases - before == num_ended_leases
        await pair.prefill.generate(random_prompt(1000, "other"))


@MODULE_LOOP
async def test_a_handover_without_a_lease_is_computed(pair: Pair) -> None:
    prompt = random_prompt(900, "none")
    expected = await pair.plain(prompt, 9)
    first = await pair.prefilled(prompt)
    assert first.kv_transfer_params is not None
    rest = await pair.decode.generate(
        prompt + first.token_ids,
        max_tokens=8,
        kv=first.kv_transfer_params | {"remote_lease_id": None},
    )
    assert first.token_ids + rest.token_ids == expected


@MODULE_LOOP
async def test_a_lease_that_ends_during_the_read(pair: Pair) -> None:
    """Last: from here on this decode looks at leases late."""
    prompt = random_prompt(900, "during")
    expected = await pair.plain(prompt, 9)
    await pair.decode.core.collective_rpc_async("delay_lease_reads", args=(3 * LEASE_S,))
    first = await pair.prefilled(prompt)
    before = pair.num_ended_leases
    reading = await pair.decode.start(
        prompt + first.token_ids, max_tokens=8, kv=first.kv_transfer_params
    )
    await pair.lose_and_reuse_blocks(4)
    await asyncio.wait_for(reading.ended.wait(), 20)
    assert first.token_ids + reading.token_ids == expected
    assert pair.num_ended_leases - before == 1
