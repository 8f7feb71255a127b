"""Who finds a replica's channel on the live cluster gets nowhere without the secret."""

import asyncio

import psutil
import pytest
from servers import DECODE, PREFILL, Server

from engine.channel import connect
from engine.errors import ChannelClosed
from engine.exit_cause import EngineExit
from engine.wire import (
    PROTOCOL_VERSION,
    Holdings,
    Rejection,
    StepOutputs,
    Taken,
    Transferred,
    Warmed,
)
from kvtransfer.errors import GreetingFailed
from kvtransfer.greeting import ClientGreeting

GREETING_S = 1.0


class Intruder:
    """A router's side that must never hear anything."""

    def step_received(self, step: StepOutputs) -> None:
        raise AssertionError(step)

    def taken(self, taken: Taken) -> None:
        raise AssertionError(taken)

    def rejected(self, rejection: Rejection) -> None:
        raise AssertionError(rejection)

    def warmed(self, warmed: Warmed) -> None:
        raise AssertionError(warmed)

    def holds(self, holdings: Holdings) -> None:
        raise AssertionError(holdings)

    def transferred(self, moved: list[Transferred]) -> None:
        raise AssertionError(moved)

    def engine_ended(self, how: EngineExit) -> None:
        raise AssertionError(how)

    def replica_gone(self, reason: str) -> None:
        raise AssertionError(reason)


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
                address, secret="guessed", router_id="intruder", replica_id="", owner=Intruder()
            )
        reasons.append(str(refused.value))
    # The channel's own, and those of the KV handshakes, which speak another protocol.
    assert sum("does not know this application's secret" in reason for reason in reasons) == 1
    assert all("secret" in reason or "protocol" in reason for reason in reasons)
