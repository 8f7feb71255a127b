"""Sides of different tensor parallelism: each of prefill's workers is read, and each is asked."""

import asyncio
import random
from typing import Any

import pytest
from kv_engines import PREFILL_ONLY, handed_over, plain, random_prompt, running_engines

from engine.models import resolve_model
from kvtransfer.peers import KVPeer, warm_up
from kvtransfer.side_channel import ReservedPort

HOST = "127.0.0.1"
LEASE_S = 1


async def test_one_decode_worker_reads_two_of_prefill() -> None:
    model = resolve_model("demo")
    small = {"lease_s": LEASE_S, "max_model_len": 1024, "num_gpu_blocks_override": 12}
    with ReservedPort(HOST) as port:
        both_workers = {
            "side_channel_port": port.port,
            "tensor_parallel_size": 2,
            "distributed_executor_backend": "mp",
        }
        async with running_engines(model, ("prefill", both_workers), "decode", **small) as (
            prefill,
            decode,
        ):
            peer = KVPeer(engine_id=prefill.engine_id, host=HOST, port=port.port, tp_size=2)
            assert await warm_up(decode.core, peer) is None
            for lease_ends in (False, True):
                prompt = random.Random(lease_ends).choices(range(4, 700), k=900)
                expected = await decode.generate(prompt, max_tokens=6)
                await decode.core.reset_prefix_cache_async()
                first = await prefill.generate(prompt, kv=dict(PREFILL_ONLY))
                if lease_ends:
                    await asyncio.sleep(1.5 * LEASE_S)
                    for seed in range(3):
                        other = random.Random(seed).choices(range(4, 700), k=1000)
                        await prefill.generate(other)
                before = sum(delta.num_ended_leases for delta in decode.transfers)
                rest = await decode.generate(
                    prompt + first.token_ids, max_tokens=5, kv=first.kv_transfer_params
                )
                assert first.token_ids + rest.token_ids == expected.token_ids
                ended = sum(delta.num_ended_leases for delta in decode.transfers) - before
                assert ended == lease_ends


async def test_two_busy_decode_workers_are_called_once_for_a_pair(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    both_workers = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with ReservedPort(HOST) as port:
        async with running_engines(
            resolve_model("demo"),
            ("prefill", {"side_channel_port": port.port}),
            ("decode", both_workers),
        ) as (prefill, decode):
            called: list[str] = []
            call = decode.core.collective_rpc_async

            async def counted(method: str, **how: Any) -> Any:
                called.append(method)
                return await call(method, **how)

            monkeypatch.setattr(decode.core, "collective_rpc_async", counted)
            peer = KVPeer(engine_id=prefill.engine_id, host=HOST, port=port.port, tp_size=1)
            writing = await decode.start([5, 6, 7], max_tokens=4000)
            await decode.until(lambda stats: stats.num_running_reqs == 1, 20)
            problems = await asyncio.gather(*(decode.peers.warm_up(peer) for _ in range(3)))
            assert problems == [None] * 3
            assert not writing.ended.is_set()
            assert called == ["warm_up_kv_peer"]
            await decode.core.abort_requests_async([writing.request_id])
            prompt = random_prompt(300, "both")
            expected = await plain(decode, prompt, 6)
            assert await handed_over(prefill, decode, prompt) == expected
