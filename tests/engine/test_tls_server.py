"""The channel, encrypted: big messages, strangers, new certificates."""

import asyncio
import contextlib
from pathlib import Path

import pytest
import torch
from certificates import Authority
from test_channel import FakeReplica, FakeRouter, big_request, request

from engine.channel import ReplicaEnd, connect, listen
from engine.errors import ChannelClosed
from engine.wire import AddRequest, Kind
from kvtransfer.greeting import MAX_STRANGERS
from kvtransfer.tls import Tls


async def let_in(port: int, tls: Tls | None, router: FakeRouter) -> ReplicaEnd:
    await connect(
        ("127.0.0.1", port),
        secret="s",
        router_id="r",
        replica_id="e",
        welcomed=router.welcomed,
        tls=tls,
    )
    return router.end


async def test_messages_of_any_size_arrive(tmp_path: Path) -> None:
    tls = Tls(Authority("ca").files(tmp_path))
    replica, router = FakeReplica(), FakeRouter()
    server, port = await listen("127.0.0.1", "s", replica, tls=tls)
    assert server.is_serving()
    end = await let_in(port, tls, router)
    big = big_request("big", 20 << 20)
    end.send(Kind.ADD, AddRequest(big, 1.0))
    end.send(Kind.ADD, AddRequest(request("after"), 1.0))
    await asyncio.wait_for(end.drained(), 60)
    async with asyncio.timeout(60):
        while len(replica.added) < 2:
            replica.changed.clear()
            await replica.changed.wait()
    arrived = replica.added[0].request.prompt_embeds
    assert arrived is not None
    assert big.prompt_embeds is not None
    assert torch.equal(arrived, big.prompt_embeds)
    end.close("done")
    await asyncio.wait_for(replica.gone.wait(), 5)
    server.close()
    await server.wait_closed()


async def test_who_has_no_certificate_of_ours_is_not_let_in(tmp_path: Path) -> None:
    for name in ("ours", "others"):
        (tmp_path / name).mkdir()
    ours = Tls(Authority("ca").files(tmp_path / "ours"))
    others = Tls(Authority("ca").files(tmp_path / "others"))
    replica = FakeReplica()
    server, port = await listen("127.0.0.1", "s", replica, tls=ours)
    for tls in (others, None):
        with pytest.raises((ChannelClosed, OSError)):
            await let_in(port, tls, FakeRouter())
    end = await let_in(port, ours, FakeRouter())
    assert end.is_open
    end.close("done")
    server.close()
    await server.wait_closed()


async def test_strangers_that_shake_no_hands_keep_no_router_out(tmp_path: Path) -> None:
    tls = Tls(Authority("ca").files(tmp_path))
    server, port = await listen("127.0.0.1", "s", FakeReplica(), tls=tls)
    strangers = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2 * MAX_STRANGERS)]
    end = await let_in(port, tls, FakeRouter())
    for reader, _ in strangers[:MAX_STRANGERS]:
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(-1), 5) == b""
    end.close("done")
    for _, writer in strangers:
        writer.close()
    server.close()
    await server.wait_closed()


async def test_a_new_certificate_is_shown_to_whoever_comes_next(tmp_path: Path) -> None:
    authority = Authority("ca")
    tls = Tls(authority.files(tmp_path))
    server, port = await listen("127.0.0.1", "s", FakeReplica(), tls=tls)
    shown = []
    for _ in range(2):
        end = await let_in(port, tls, FakeRouter())
        assert end._transport is not None
        shown.append(end._transport.get_extra_info("ssl_object").getpeercert(binary_form=True))
        end.close("done")
        authority.files(tmp_path)
    assert shown[0] != shown[1]
    server.close()
    await server.wait_closed()
