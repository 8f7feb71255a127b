"""Who finds a replica's channel on the live cluster gets nowhere without the secret."""

import asyncio
from typing import Any

import psutil
import pytest
from servers import DECODE, PREFILL, Server

from engine.channel import ReplicaEnd, connect
from engine.errors import ChannelClosed
from engine.wire import PROTOCOL_VERSION, ReplicaFacts
from kvtransfer.errors import GreetingFailed
from kvtransfer.greeting import ClientGreeting

GREETING_S = 1.0


def let_in(end: ReplicaEnd, facts: ReplicaFacts) -> Any:
    """Of a router that must never be."""
    raise AssertionError(facts)


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    """Where a process and those below it can be reached, which is on this machine only."""
    found = set()
    for each in [process, *process.children(recursive=True)]:
        for socket in each.net_connections(kind="tcp4"):
            if socket.status == psutil.CONN_LISTEN:
                host = "127.0.0.1" if socket.laddr.ip == "0.0.0.0" else socket.laddr.ip
                found.add((host, socket.laddr.port))
    return found


async def challenges(address: tuple[str, int]) -> bool:
    """Whether who listens there greets as a replica does."""
    reader, writer = await asyncio.open_connection(*address)
    try:
        async with asyncio.timeout(GREETING_S):
            greeting = ClientGreeting("", "", secret="", purpose="", version=PROTOCOL_VERSION)
            return len(greeting.feed(await reader.read(4096))) > 0
    except GreetingFailed as failure:
        return str(failure).startswith("protocol")
    except (TimeoutError, ConnectionError):
        return False
    finally:
        writer.close()


@pytest.mark.parametrize("pool", [PREFILL, DECODE])
async def test_a_wrong_secret_is_refused(cluster: Server, pool: str) -> None:
    (replica,) = cluster.processes(f"ray::ServeReplica:pdserve:{pool}")
    addresses = sorted(listening(replica))
    greets = await asyncio.gather(*map(challenges, addresses))
    ours = [address for address, is_ours in zip(addresses, greets, strict=True) if is_ours]
    reasons = []
    for address in ours:
        with pytest.raises(ChannelClosed) as refused:
            await connect(
                address, secret="guessed", router_id="intruder", replica_id="", welcomed=let_in
            )
        reasons.append(str(refused.value))
    # The channel's own, and those of the KV handshakes, which speak another protocol.
    assert sum("does not know this application's secret" in reason for reason in reasons) == 1
    assert all("secret" in reason or "protocol" in reason for reason in reasons)
