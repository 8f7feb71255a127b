"""The point-to-point connector when prefill dies, comes back or hangs: decode computes, goes on."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from kv_engines import Engine, running_engines
from kv_scenes import dies_while_it_is_read, hands_over, hangs_while_it_is_read

from engine.demo_model import resolve_model
from kvtransfer.peers import KVPeer, forget, warm_up
from kvtransfer.side_channel import ReservedPort

pytestmark = pytest.mark.asyncio(loop_scope="module")

HOST = "127.0.0.1"
READ_TIMEOUT_S = 2.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def decode() -> AsyncIterator[Engine]:
    async with running_engines(
        resolve_model("demo"), "decode", connector="nccl", read_timeout_s=READ_TIMEOUT_S
    ) as (engine,):
        yield engine


async def test_prefill_dies_while_it_is_read_and_comes_back(decode: Engine) -> None:
    port = ReservedPort(HOST)
    model = resolve_model("demo")
    async with running_engines(model, "prefill", connector="nccl", side_channel_port=port.port) as (
        prefill,
    ):
        peer = KVPeer(engine_id=prefill.engine_id, host=HOST, port=port.port, tp_size=1)
        assert await warm_up(decode.core, peer) is None
        assert await warm_up(decode.core, peer) is None
        await hands_over(prefill, decode, "before")
        await dies_while_it_is_read(prefill, decode)
        assert await warm_up(decode.core, peer) is not None
        await forget(decode.core, prefill.engine_id)

    async with running_engines(model, "prefill", connector="nccl", side_channel_port=port.port) as (
        successor,
    ):
        # Who still asks for the one before is told that it is another.
        problem = await warm_up(decode.core, peer)
        assert problem is not None
        assert successor.engine_id in problem
        await hands_over(successor, decode, "after")
    port.close()
    await decode.until(lambda stats: stats.kv_cache_usage == 0, 5)


async def test_a_prefill_that_hangs_holds_up_nobody_else(decode: Engine) -> None:
    async with running_engines(resolve_model("demo"), "prefill", connector="nccl") as (prefill,):
        await hands_over(prefill, decode, "warm")
        await hangs_while_it_is_read(prefill, decode)
        await hands_over(prefill, decode, "goes on")


async def test_a_pair_that_does_not_fit_is_told_apart(decode: Engine) -> None:
    port = ReservedPort(HOST)
    async with running_engines(
        resolve_model("demo"),
        "prefill",
        connector="nccl",
        side_channel_port=port.port,
        block_size=32,
        dtype="bfloat16",
    ) as (prefill,):
        peer = KVPeer(engine_id=prefill.engine_id, host=HOST, port=port.port, tp_size=1)
        problem = await warm_up(decode.core, peer)
        assert problem is not None
        assert "block_size is 32 in prefill and 128 in decode" in problem
        assert "dtype is torch.bfloat16 in prefill and torch.float32 in decode" in problem
    port.close()
