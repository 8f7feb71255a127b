"""Pairs of real engines: made ready before their first request, or kept apart by one clear line."""

import random
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio
from kv_engines import PREFILL_ONLY, Engine, running_engines
from kv_faults import FAULTY_WORKER

from engine.models import resolve_model
from kvtransfer.peers import KVPeer, forget, warm_up
from kvtransfer.side_channel import ReservedPort

pytestmark = pytest.mark.asyncio(loop_scope="module")

HOST = "127.0.0.1"


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
            ("decode", {"worker_extension_cls": FAULTY_WORKER}),
            ("prefill", {"side_channel_port": port.port}),
            ("prefill", unfit),
        ) as (decode, prefill, other):
            yield Engines(
                decode=decode,
                prefill=prefill,
                peer=peer(prefill.engine_id, port.port),
                unfit_peer=peer(other.engine_id, unfit_port.port),
            )


def peer(engine_id: str, port: int) -> KVPeer:
    return KVPeer(engine_id=engine_id, host=HOST, port=port, tp_size=1)


async def num_handshakes(decode: Engine) -> int:
    (count,) = await decode.core.collective_rpc_async("num_handshakes")
    return int(count)


async def known_peers(decode: Engine) -> list[str]:
    (engine_ids,) = await decode.core.collective_rpc_async("known_kv_peers")
    return list(engine_ids)


async def test_a_pair_that_is_warm_needs_no_handshake(engines: Engines) -> None:
    decode, prefill, port = engines.decode, engines.prefill, engines.peer.port
    before = await num_handshakes(decode)
    assert await warm_up(decode.core, engines.peer) is None
    assert await warm_up(decode.core, engines.peer) is None
    assert await num_handshakes(decode) - before == 1

    prompt = random.Random(1).choices(range(4, 700), k=300)
    expected = await decode.generate(prompt, max_tokens=6)
    await decode.core.reset_prefix_cache_async()
    first = await prefill.generate(prompt, kv=dict(PREFILL_ONLY))
    params = first.kv_transfer_params
    assert params is not None
    assert (params["remote_host"], params["remote_port"]) == (HOST, port)
    rest = await decode.generate(prompt + first.token_ids, max_tokens=5, kv=params)
    assert first.token_ids + rest.token_ids == expected.token_ids
    assert rest.prefill_stats.num_external_cached_tokens == len(prompt)
    assert await num_handshakes(decode) - before == 1

    assert await warm_up(decode.core, peer("other", port)) == (
        f"the KV engine at {HOST}:{port}: the other side refuses:"
        f" this is {prefill.engine_id}, not other"
    )
    await forget(decode.core, prefill.engine_id)
    assert await known_peers(decode) == []
    assert await warm_up(decode.core, engines.peer) is None
    await forget(decode.core, prefill.engine_id)


async def test_a_pair_that_does_not_fit(engines: Engines) -> None:
    expected = (
        f"the KV of engine {engines.unfit_peer.engine_id} does not fit:"
        " dtype is torch.bfloat16 on prefill and torch.float32 on decode;"
        " block size is 32 on prefill and 128 on decode"
    )
    assert await warm_up(engines.decode.core, engines.unfit_peer) == expected
    # Asked again it is looked at again.
    assert await warm_up(engines.decode.core, engines.unfit_peer) == expected
    assert await known_peers(engines.decode) == []


async def test_nobody_there(engines: Engines) -> None:
    with ReservedPort(HOST) as port:
        problem = await warm_up(engines.decode.core, peer("nobody", port.port))
    assert problem is not None
    assert problem.startswith(f"no KV engine listens at {HOST}:{port.port}: ")
