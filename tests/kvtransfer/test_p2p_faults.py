"""The point-to-point connector when prefill dies, comes back or hangs: decode computes, goes on."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass

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

from benchmarks.chaos_processes import suspend
from engine.models import resolve_model
from kvtransfer.peers import KVPeer, forget, warm_up
from kvtransfer.side_channel import ReservedPort

pytestmark = pytest.mark.asyncio(loop_scope="module")

HOST = "127.0.0.1"
READ_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """A decode, a prefill that fits it and one that does not, and where to reach these."""

    decode: Engine
    prefill: Engine
    peer: KVPeer
    unfit_peer: KVPeer


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engines() -> AsyncIterator[Engines]:
    with ReservedPort(HOST) as port, ReservedPort(HOST) as unfit_port:
        unfit = {"side_channel_port": unfit_port.port, "block_size": 32, "dtype": "bfloat16"}
        async with running_engines(
            resolve_model("demo"),
            ("decode", {"read_timeout_s": READ_TIMEOUT_S}),
            ("prefill", {"side_channel_port": port.port}),
            ("prefill", unfit),
            connector="nccl",
        ) as (decode, prefill, other):
            yield Engines(
                decode=decode,
                prefill=prefill,
                peer=peer(prefill.engine_id, port.port),
                unfit_peer=peer(other.engine_id, unfit_port.port),
            )


def peer(engine_id: str, port: int) -> KVPeer:
    return KVPeer(engine_id=engine_id, host=HOST, port=port, tp_size=1)


async def hands_over(prefill: Engine, decode: Engine, seed: str) -> None:
    prompt = random_prompt(300, seed)
    expected = await plain(decode, prompt, 6)
    assert await handed_over(prefill, decode, prompt) == expected


async def test_a_pair_that_does_not_fit_is_told_apart(engines: Engines) -> None:
    problem = await warm_up(engines.decode.core, engines.unfit_peer)
    assert problem is not None
    assert "block_size is 32 in prefill and 128 in decode" in problem
    assert "dtype is torch.bfloat16 in prefill and torch.float32 in decode" in problem


async def test_a_pair_is_made_ready_before_its_first_request(engines: Engines) -> None:
    for _ in range(2):
        assert await warm_up(engines.decode.core, engines.peer) is None
    await hands_over(engines.prefill, engines.decode, "ready")


async def test_a_prefill_that_hangs_holds_up_nobody_else(engines: Engines) -> None:
    prefill, decode = engines.prefill, engines.decode
    await hands_over(prefill, decode, "warm")
    prompt, other = random_prompt(1000, "hangs"), random_prompt(200, "other")
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
        await asyncio.wait_for(late.ended.wait(), 30)
    finally:
        os.kill(prefill.pid, signal.SIGCONT)
    assert first.token_ids + late.token_ids == expected
    await hands_over(prefill, decode, "goes on")


async def test_prefill_dies_while_it_is_read_and_comes_back(engines: Engines) -> None:
    """Last: the prefill of this module is dead from here on."""
    prefill, decode, port = engines.prefill, engines.decode, engines.peer.port
    prompts = [random_prompt(4000, f"dies {number}") for number in range(3)]
    expected = [await plain(decode, prompt, 6) for prompt in prompts]
    await hands_over(prefill, decode, "before")
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
    assert await warm_up(decode.core, engines.peer) is not None
    await forget(decode.core, prefill.engine_id)

    async with running_engines(
        resolve_model("demo"), "prefill", connector="nccl", side_channel_port=port
    ) as (successor,):
        # Who still asks for the one before is told that it is another.
        problem = await warm_up(decode.core, engines.peer)
        assert problem is not None
        assert successor.engine_id in problem
        await hands_over(successor, decode, "after")
    await decode.until(lambda stats: stats.kv_cache_usage == 0, 5)
