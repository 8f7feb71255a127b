"""Who finds a replica's channel on the live cluster gets nowhere without the secret."""

import asyncio

import psutil
import pytest
from servers import DECODE, PREFILL, Server

from engine.channel import connect
from engine.errors import ChannelClosed, ProtocolError
from engine.exit_cause import EngineExit
from engine.wire import FrameReader, Holdings, Kind, Rejection, StepOutputs, Taken, Warmed

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

    def engine_ended(self, how: EngineExit) -> None:
        raise AssertionError(how)

    def replica_gone(self, reason: str) -> None:
        raise AssertionError(reason)


def listening(process: psutil.Process) -> set[tuple[str, int]]:
    """Where a process and those below it can be reached."""
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
            frames = list(FrameReader().feed(await reader.read(4096)))
    except (TimeoutError, ProtocolError, ConnectionError):
        return False
    finally:
        writer.close()
    return [kind for kind, _ in frames] == [Kind.CHALLENGE]


@pytest.mark.parametrize("pool", [PREFILL, DECODE])
async def test_a_wrong_secret_is_refused(cluster: Server, pool: str) -> None:
    (replica,) = cluster.processes(f"ray::ServeReplica:pdserve:{pool}")
    addresses = sorted(listening(replica))
    greets = await asyncio.gather(*map(challenges, addresses))
    (channel,) = (address for address, is_ours in zip(addresses, greets, strict=True) if is_ours)
    with pytest.raises(ChannelClosed):
        await connect(channel, secret="guessed", router_id="intruder", owner=Intruder())
