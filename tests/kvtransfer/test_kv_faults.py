"""Prefill engines that die, come back, or stop in the midst of it: decode computes, and goes on."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest
import pytest_asyncio
from kv_engines import (
    PREFILL_ONLY,
    Engine,
    handed_over,
    plain,
    random_prompt,
    running_engines,
)
from kv_faults import FAULTY_WORKER

from benchmarks.chaos_processes import suspend
from engine.models import resolve_model
from kvtransfer.config import Sharing
from kvtransfer.peers import KVPeer, forget, warm_up
from kvtransfer.side_channel import ReservedPort

pytestmark = pytest.mark.asyncio(loop_scope="module")

HOST = "127.0.0.1"
READ_TIMEOUT_S = 2.0

EITHER_WAY = pytest.mark.parametrize("sharing", get_args(Sharing))
"""Whether decode copies the memory of a prefill on its host, or NIXL reads it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """One decode, and a prefill for each way in which it gets at the blocks."""

    decode: Engine
    prefills: dict[Sharing, Engine]


@contextlib.asynccontextmanager
async def faulty_engines() -> AsyncIterator[Engines]:
    ways: tuple[Sharing, ...] = get_args(Sharing)
    async with running_engines(
        resolve_model("demo"),
        "decode",
        *(("prefill", {"shared_memory": way}) for way in ways),
        worker_extension_cls=FAULTY_WORKER,
        read_timeout_s=READ_TIMEOUT_S,
    ) as (decode, *prefills):
        yield Engines(decode=decode, prefills=dict(zip(ways, prefills, strict=True)))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines() -> AsyncIterator[Engines]:
    async with faulty_engines() as engines:
        yield engines


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines_over_tcp() -> AsyncIterator[Engines]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UCX_TLS", "tcp")
        async with faulty_engines() as engines:
            yield engines


async def known_peers(decode: Engine) -> list[str]:
    (engine_ids,) = await decode.core.collective_rpc_async("known_kv_peers")
    return list(engine_ids)


def num_mappings(decode: Engine) -> int:
    """Of prefill engines' KV, by the kernel's account."""
    return Path(f"/proc/{decode.pid}/maps").read_text().count("/memfd:pdserve-kv-")


@EITHER_WAY
async def test_a_read_that_fails_once_is_tried_again(engines: Engines, sharing: Sharing) -> None:
    prefill, decode = engines.prefills[sharing], engines.decode
    for num_failures, num_external_tokens in ((1, 300), (2, 0)):
        prompt = random_prompt(300, f"fails {num_failures}")
        expected = await plain(decode, prompt, 6)
        first = await prefill.generate(prompt, kv=dict(PREFILL_ONLY))
        await decode.core.collective_rpc_async("fail_reads", args=(num_failures,))
        before = decode.num_bytes_read
        rest = await decode.generate(
            prompt + first.token_ids, max_tokens=5, kv=first.kv_transfer_params
        )
        assert first.token_ids + rest.token_ids == expected
        assert (decode.num_bytes_read > before) == (num_external_tokens > 0)


async def test_prefill_dies_and_comes_back_at_its_address(engines: Engines) -> None:
    model, decode = resolve_model("demo"), engines.decode
    prompts = [random_prompt(1000, f"dies {number}") for number in range(4)]
    expected = [await plain(decode, prompt, 6) for prompt in prompts]
    other = random_prompt(200, "other")
    other_expected = await plain(decode, other, 300)
    before = num_mappings(decode)
    with ReservedPort(HOST) as reserved:
        async with running_engines(model, "prefill", side_channel_port=reserved.port) as (prefill,):
            warm = random_prompt(300, "warm")
            assert await handed_over(prefill, decode, warm) == await plain(decode, warm, 6)
            firsts = [await prefill.generate(prompt, kv=dict(PREFILL_ONLY)) for prompt in prompts]
            bystander = await decode.start(other, max_tokens=300)
            assert num_mappings(decode) == before + 1
            await prefill.kill()
            rests = await asyncio.gather(
                *(
                    decode.generate(
                        prompt + first.token_ids, max_tokens=5, kv=first.kv_transfer_params
                    )
                    for prompt, first in zip(prompts, firsts, strict=True)
                )
            )
            answers = [a.token_ids + b.token_ids for a, b in zip(firsts, rests, strict=True)]
            assert answers == expected
            await asyncio.wait_for(bystander.ended.wait(), 20)
            assert bystander.token_ids == other_expected
            assert prefill.engine_id not in await known_peers(decode)
            assert num_mappings(decode) == before

        async with running_engines(model, "prefill", side_channel_port=reserved.port) as (heir,):
            late = {"remote_engine_id": prefill.engine_id, "remote_port": reserved.port}
            assert firsts[0].kv_transfer_params is not None
            await decode.core.reset_prefix_cache_async()
            rest = await decode.generate(
                prompts[0] + firsts[0].token_ids,
                max_tokens=5,
                kv=firsts[0].kv_transfer_params | late,
            )
            assert firsts[0].token_ids + rest.token_ids == expected[0]
            peer = KVPeer(engine_id=heir.engine_id, host=HOST, port=reserved.port, tp_size=1)
            assert await warm_up(decode.core, peer) is None
            again = random_prompt(300, "again")
            assert await handed_over(heir, decode, again) == await plain(decode, again, 6)
            assert num_mappings(decode) == before + 1
            await forget(decode.core, heir.engine_id)
            assert num_mappings(decode) == before


@EITHER_WAY
async def test_prefill_dies_while_it_is_read(engines: Engines, sharing: Sharing) -> None:
    """At whatever moment: its blocks are whole, or they are computed.

    Last of those with these engines: the prefills are dead from here on.
    """
    prefill, decode = engines.prefills[sharing], engines.decode
    prompts = [random_prompt(4000, f"while {number}") for number in range(3)]
    expected = [await plain(decode, prompt, 6) for prompt in prompts]
    warm = random_prompt(300, "warm")
    assert await handed_over(prefill, decode, warm) == await plain(decode, warm, 6)
    firsts = [await prefill.generate(prompt, kv=dict(PREFILL_ONLY)) for prompt in prompts]
    rests = [
        await decode.start(prompt + first.token_ids, max_tokens=5, kv=first.kv_transfer_params)
        for prompt, first in zip(prompts, firsts, strict=True)
    ]
    await prefill.kill()
    for rest in rests:
        await asyncio.wait_for(rest.ended.wait(), 30)
    answers = [a.token_ids + b.token_ids for a, b in zip(firsts, rests, strict=True)]
    assert answers == expected
    await decode.until(lambda stats: stats.kv_cache_usage == 0, 5)


@EITHER_WAY
async def test_a_read_that_never_ends(engines_over_tcp: Engines, sharing: Sharing) -> None:
    """Over TCP a read needs the peer's help, that of its lease at least, and it is stopped."""
    prefill, decode = engines_over_tcp.prefills[sharing], engines_over_tcp.decode
    warm = random_prompt(300, "warm")
    assert await handed_over(prefill, decode, warm) == await plain(decode, warm, 6)
    prompt, other = random_prompt(1000, "stopped"), random_prompt(200, "other")
    expected, other_expected = await plain(decode, prompt, 6), await plain(decode, other, 6)
    first = await prefill.generate(prompt, kv=dict(PREFILL_ONLY))
    suspend(prefill.pid)
    try:
        late = await decode.start(
            prompt + first.token_ids, max_tokens=5, kv=first.kv_transfer_params
        )
        bystander = await decode.generate(other, max_tokens=6)
        assert bystander.token_ids == other_expected
        assert not late.ended.is_set()
        await asyncio.wait_for(late.ended.wait(), 60)
    finally:
        os.kill(prefill.pid, signal.SIGCONT)
    assert first.token_ids + late.token_ids == expected
    # The peer goes on, and what it still sends reaches no block: these are used once more.
    await asyncio.sleep(1)
    again = await decode.generate(prompt, max_tokens=6)
    assert again.token_ids == expected
    assert again.prefill_stats.num_local_cached_tokens > 0
