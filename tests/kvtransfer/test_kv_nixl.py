"""The connector between two real engines: what decode computes, what moves, what is given back."""

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import psutil
import pytest
import pytest_asyncio
from kv_engines import PREFILL_ONLY, Answer, Engine, handed_over, running_engines

from engine.demo_model import MODEL_CONFIG
from engine.models import resolve_model
from kvtransfer.release import release

pytestmark = pytest.mark.asyncio(loop_scope="module")

# The size of a block, and how decode gets one that is on its host.
PAIRS = ((128, "auto"), (128, "never"), (32, "auto"))
EITHER_WAY = pytest.mark.parametrize("pair", PAIRS[:2], indirect=True)
EVERY_PAIR = pytest.mark.parametrize("pair", PAIRS, indirect=True)

FLOAT32_BYTES = 4
BYTES_PER_TOKEN: int = FLOAT32_BYTES * prod(
    (
        MODEL_CONFIG["num_hidden_layers"],
        2,  # keys and values
        MODEL_CONFIG["num_key_value_heads"],
        MODEL_CONFIG["head_dim"],
    )  # type: ignore[arg-type]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    prefill: Engine
    decode: Engine
    block_size: int
    copies_memory: bool

    async def plain(self, prompt: list[int], max_tokens: int) -> list[int]:
        """What one engine answers that computes everything itself."""
        await self.decode.core.reset_prefix_cache_async()
        answer = await self.decode.generate(prompt, max_tokens=max_tokens)
        await self.decode.core.reset_prefix_cache_async()
        return answer.token_ids

    async def prefilled(self, prompt: list[int], **how: Any) -> Answer:
        return await self.prefill.generate(prompt, kv=dict(PREFILL_ONLY), **how)

    async def holds_nothing(self, within_s: float = 1.0) -> None:
        """Both engines are free of every request, without another one to wake them up."""
        for engine in (self.prefill, self.decode):
            await engine.until(lambda stats: stats.kv_cache_usage == 0, within_s)
        for engine in (self.prefill, self.decode):
            # The stats above may be older than the request: see what a new step says.
            await engine.generate([5])
            assert engine.stats.kv_cache_usage == 0

    @property
    def num_transfers_and_copies(self) -> tuple[int, int]:
        deltas = self.decode.transfers
        return sum(each.num_transfers for each in deltas), sum(each.num_copies for each in deltas)

    def num_bytes(self, num_blocks: int) -> int:
        return num_blocks * self.block_size * BYTES_PER_TOKEN


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    model = resolve_model("demo")
    block_size, sharing = request.param
    async with running_engines(
        model, "prefill", "decode", block_size=block_size, shared_memory=sharing
    ) as engines:
        yield Pair(
            prefill=engines[0],
            decode=engines[1],
            block_size=block_size,
            copies_memory=sharing == "auto",
        )


def random_prompt(num_tokens: int) -> list[int]:
    return random.Random(num_tokens).choices(range(4, 700), k=num_tokens)


@EITHER_WAY
async def test_decode_gone_before_the_pairs_first_handshake(pair: Pair) -> None:
    """The engine must not go idle with the notification still to be sent."""
    prompt = random_prompt(300)
    first = await pair.prefilled(prompt)
    gone = await pair.decode.start(prompt + first.token_ids, kv=first.kv_transfer_params)
    await pair.decode.core.abort_requests_async([gone.request_id])
    # A pair's first handshake also loads NIXL's transports.
    await pair.holds_nothing(within_s=5)


@EVERY_PAIR
@pytest.mark.parametrize(
    ("blocks", "past_boundary"), [(0, 1), (1, -1), (1, 0), (1, 1), (3, -1), (3, 0), (3, 1)]
)
async def test_decode_goes_on_from_prefills_first_token(
    pair: Pair, blocks: int, past_boundary: int
) -> None:
    num_tokens = blocks * pair.block_size + past_boundary
    prompt = random_prompt(num_tokens)
    expected = await pair.plain(prompt, 6)

    first = await pair.prefilled(prompt)
    before = pair.decode.num_bytes_read
    num_transfers, num_copies = pair.num_transfers_and_copies
    rest = await pair.decode.generate(
        prompt + first.token_ids, max_tokens=5, kv=first.kv_transfer_params
    )

    assert first.token_ids + rest.token_ids == expected
    assert rest.prefill_stats.num_external_cached_tokens == num_tokens
    assert rest.prefill_stats.num_computed_tokens == 1
    num_blocks = ceil(num_tokens / pair.block_size)
    assert pair.decode.num_bytes_read - before == pair.num_bytes(num_blocks)
    one_more = (num_transfers + 1, num_copies + int(pair.copies_memory))
    assert pair.num_transfers_and_copies == one_more
    await pair.holds_nothing()


@EITHER_WAY
@pytest.mark.parametrize("past_boundary", [-1, 0, 1])
async def test_decode_reads_only_the_blocks_it_lacks(pair: Pair, past_boundary: int) -> None:
    num_tokens = 2 * pair.block_size + past_boundary
    prompt = random_prompt(num_tokens)
    expected = await pair.plain(prompt, 6)
    for _ in range(2):
        first = await pair.prefilled(prompt)
        before = pair.decode.num_bytes_read
        rest = await pair.decode.generate(
            prompt + first.token_ids, max_tokens=5, kv=first.kv_transfer_params
        )
        assert first.token_ids + rest.token_ids == expected

    num_full_blocks, num_tail_tokens = divmod(num_tokens, pair.block_size)
    assert rest.prefill_stats.num_local_cached_tokens == num_full_blocks * pair.block_size
    assert rest.prefill_stats.num_external_cached_tokens == num_tail_tokens
    assert rest.prefill_stats.num_computed_tokens == 1
    assert pair.decode.num_bytes_read - before == pair.num_bytes(int(num_tail_tokens > 0))
    await pair.holds_nothing()


@EITHER_WAY
@pytest.mark.parametrize("num_tokens", [2, 127, 128, 129])
async def test_decode_of_the_same_prompt_recomputes_its_last_token(
    pair: Pair, num_tokens: int
) -> None:
    prompt = random_prompt(num_tokens)
    expected = await pair.plain(prompt, 5)
    first = await pair.prefilled(prompt)
    answer = await pair.decode.generate(prompt, max_tokens=5, kv=first.kv_transfer_params)
    assert answer.token_ids == expected
    assert answer.prefill_stats.num_external_cached_tokens == num_tokens
    await pair.holds_nothing()


@EITHER_WAY
async def test_prefill_that_stops_at_its_first_token_keeps_nothing(pair: Pair) -> None:
    prompt = random_prompt(200)
    (token_id,) = await pair.plain(prompt, 1)
    first = await pair.prefilled(prompt, stop_token_ids=[token_id])
    assert first.finish_reason.name == "STOP"
    assert first.kv_transfer_params is None
    await pair.holds_nothing()


@EITHER_WAY
async def test_release_frees_what_waits_for_a_decode(pair: Pair) -> None:
    answers = [await pair.prefilled(random_prompt(num_tokens)) for num_tokens in (100, 200, 300)]
    await pair.prefill.until(lambda stats: stats.kv_cache_usage > 0, 1)
    await release(pair.prefill.core, [answer.request_id for answer in answers])
    await pair.holds_nothing()


@EITHER_WAY
async def test_release_ends_a_running_prefill(pair: Pair) -> None:
    running = await pair.prefill.start(random_prompt(4000), kv=dict(PREFILL_ONLY))
    await pair.prefill.until(lambda stats: stats.kv_cache_usage > 0, 10)
    await release(pair.prefill.core, [running.request_id, "of no request"])
    await pair.holds_nothing()


@EITHER_WAY
async def test_release_at_any_moment(pair: Pair) -> None:
    """Around the end of a prefill the lease moves from scheduler to worker: none slips through."""
    await pair.prefill.core.reset_prefix_cache_async()
    for delay_ms in range(12):
        running = await pair.prefill.start(random_prompt(20), kv=dict(PREFILL_ONLY))
        await asyncio.sleep(delay_ms / 1000)
        await release(pair.prefill.core, [running.request_id])
    await pair.holds_nothing()


@EITHER_WAY
async def test_abort_while_decode_reads(pair: Pair) -> None:
    """Whether it waits, reads or decodes when its client goes: both engines are free of it."""
    prompt = random_prompt(2000)
    await pair.decode.core.reset_prefix_cache_async()
    for delay_ms in range(8):
        first = await pair.prefilled(prompt)
        reading = await pair.decode.start(
            prompt + first.token_ids, max_tokens=500, kv=first.kv_transfer_params
        )
        await asyncio.sleep(delay_ms / 1000)
        await pair.decode.core.abort_requests_async([reading.request_id])
        await pair.holds_nothing()
        await pair.decode.core.reset_prefix_cache_async()


@EITHER_WAY
async def test_what_is_handed_over_does_not_wait_for_a_prompt_that_decode_reads(pair: Pair) -> None:
    """Decode reads it in pieces, here the smallest, as it writes an answer meanwhile."""
    long, prompt = random_prompt(4000), random_prompt(300)
    expected = await pair.plain(prompt, 6)
    expected_of_long = await pair.plain(long, 4)
    await handed_over(pair.prefill, pair.decode, prompt)
    await pair.decode.core.reset_prefix_cache_async()
    first = await pair.prefilled(prompt)
    writing = await pair.decode.start([5, 6, 7], max_tokens=4000)
    reading = await pair.decode.start(long, max_tokens=4, step_limit_s=1e-9)
    rest = await pair.decode.generate(
        prompt + first.token_ids, max_tokens=5, kv=first.kv_transfer_params
    )
    assert first.token_ids + rest.token_ids == expected
    assert rest.prefill_stats.num_external_cached_tokens == len(prompt)
    assert writing.token_ids
    assert not reading.token_ids
    await asyncio.wait_for(reading.ended.wait(), 20)
    assert reading.token_ids == expected_of_long
    await pair.decode.core.abort_requests_async([writing.request_id])
    await pair.decode.core.reset_prefix_cache_async()
    await pair.holds_nothing()


@EITHER_WAY
async def test_decode_computes_what_it_cannot_read(pair: Pair) -> None:
    prompt = random_prompt(300)
    expected = await pair.plain(prompt, 6)
    first = await pair.prefilled(prompt)
    assert first.kv_transfer_params is not None
    nobody = {"remote_engine_id": "nobody", "remote_port": 1}
    rest = await pair.decode.generate(
        prompt + first.token_ids, max_tokens=5, kv=first.kv_transfer_params | nobody
    )
    assert first.token_ids + rest.token_ids == expected
    failures = [delta for delta in pair.decode.transfers if delta.remote_engine_id == "nobody"]
    assert [delta.num_failures for delta in failures] == [1]
    await release(pair.prefill.core, [first.request_id])
    await pair.holds_nothing()


@EITHER_WAY
async def test_idle_engines_use_no_core(pair: Pair) -> None:
    processes = [psutil.Process(engine.pid) for engine in (pair.prefill, pair.decode)]
    for process in processes:
        process.cpu_percent()
    await asyncio.sleep(2)
    assert sum(process.cpu_percent() for process in processes) < 10
    every_core = psutil.Process().cpu_affinity()
    assert [process.cpu_affinity() for process in processes] == [every_core] * 2
