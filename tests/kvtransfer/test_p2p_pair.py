"""Pairs over real sockets and real groups: what arrives, what is refused, what breaks alone."""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from p2p_decode import Decode, job
from p2p_prefill import (
    HOST,
    NUM_BLOCKS,
    PAGE_BYTES,
    Prefill,
    layout,
)
from p2p_prefill import start_process as start_prefill_process

from benchmarks.chaos_processes import suspend
from kvtransfer.p2p_errors import FetchRefused, PairBroken, PairError, PairMismatch, PairTimeout
from kvtransfer.p2p_fetch import HeartbeatJob
from kvtransfer.p2p_link import transport_for
from kvtransfer.p2p_wire import Connection

FILL = 100


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def decode(stack: ExitStack) -> Decode:
    decode = Decode(layout())
    stack.callback(decode.stop)
    return decode


def started(stack: ExitStack, engine_id: str = "prefill", **how: Any) -> Prefill:
    prefill = Prefill(engine_id, FILL, **how)
    stack.callback(prefill.stop)
    return prefill


def until_freed(prefill: Prefill, request_id: str = "r") -> None:
    deadline_s = time.monotonic() + 10
    while request_id not in prefill.leases.collect(now_s=0).read_or_released:
        assert time.monotonic() < deadline_s, "prefill was not told"
        time.sleep(0.005)


def test_blocks_arrive_and_the_lease_ends(stack: ExitStack, decode: Decode) -> None:
    prefill = started(stack)
    prefill.hold("r", 1)
    # More than two buffers' worth, in no order.
    local, remote = tuple(range(60)), tuple(reversed(range(4, 64)))
    decode.client("prefill", prefill.port).submit(job(local, remote))

    outcome = decode.outcome()
    assert outcome.error is None
    assert outcome.num_bytes == 60 * PAGE_BYTES * len(decode.layers)
    for layer in decode.layers:
        assert layer[:60, 0].tolist() == [FILL + block for block in remote]
        assert layer[:60, -1].tolist() == [FILL + block for block in remote]
        assert layer[60:, 0].tolist() == [60, 61, 62, 63]
    until_freed(prefill)


def test_a_fetch_of_nothing_only_ends_the_lease(stack: ExitStack, decode: Decode) -> None:
    prefill = started(stack)
    prefill.hold("r", 1)
    decode.client("prefill", prefill.port).submit(job((), ()))
    outcome = decode.outcome()
    assert (outcome.error, outcome.num_bytes) == (None, 0)
    until_freed(prefill)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"lease_id": 2}, "lease has ended"),
        ({"remote_request_id": "q"}, "lease has ended"),
        ({"remote_block_ids": ((0, NUM_BLOCKS),)}, "no such blocks"),
        ({"remote_block_ids": ((0, -1),)}, "no such blocks"),
        ({"remote_block_ids": ((0,),)}, "not as many blocks"),
        ({"remote_block_ids": ()}, "not as many blocks"),
    ],
)
def test_what_is_not_held_is_refused_and_the_pair_goes_on(
    stack: ExitStack, decode: Decode, wrong: dict[str, Any], reason: str
) -> None:
    prefill = started(stack)
    prefill.hold("r", 1)
    client = decode.client("prefill", prefill.port)
    allowed = job((0, 1), (2, 3))
    client.submit(replace(allowed, **wrong))
    outcome = decode.outcome()
    assert isinstance(outcome.error, FetchRefused)
    assert reason in str(outcome.error)
    assert all(layer[:2, 0].tolist() == [0, 1] for layer in decode.layers)

    client.submit(allowed)
    assert decode.outcome().error is None


def test_a_heartbeat_keeps_a_lease(stack: ExitStack, decode: Decode) -> None:
    prefill = started(stack)
    prefill.leases.admit({"r": 1})
    prefill.leases.hold("r", expiry_s=time.perf_counter())
    client = decode.client("prefill", prefill.port)
    client.submit(HeartbeatJob(remote_request_ids=("r",)))
    client.submit(job((0,), (0,)))  # Heard after the heartbeat.
    assert decode.outcome().error is None
    assert prefill.leases.collect(now_s=time.perf_counter()).expired == frozenset()


@pytest.mark.parametrize(
    ("name", "value"),
    [("block_size", 64), ("tensor_parallel_size", 2), ("model", "n"), ("bytes_of_a_block", (1,))],
)
def test_another_layout_is_named(stack: ExitStack, name: str, value: object) -> None:
    prefill = started(stack)
    decode = Decode(layout(**{name: value}))
    stack.callback(decode.stop)
    decode.client("prefill", prefill.port).submit(job((0,), (0,)))
    error = decode.outcome().error
    assert isinstance(error, PairMismatch)
    assert name in str(error)
    assert str(value) in str(error)


def test_an_engine_that_came_back_is_not_the_one_before(stack: ExitStack, decode: Decode) -> None:
    prefill = started(stack, engine_id="second start")
    prefill.hold("r", 1)
    decode.client("first start", prefill.port).submit(job((0,), (0,)))
    assert isinstance(decode.outcome().error, PairError)
    decode.client("second start", prefill.port).submit(job((0,), (0,)))
    assert decode.outcome().error is None


def test_nobody_there_fails_at_once_and_for_all_that_wait(decode: Decode) -> None:
    client = decode.client("nobody", 1)
    for _ in range(5):
        client.submit(job((0,), (0,)))
    assert all(isinstance(decode.outcome().error, PairBroken) for _ in range(5))


def test_a_group_that_broke_is_made_anew(stack: ExitStack, decode: Decode) -> None:
    prefill = started(stack)
    prefill.hold("r", 1)
    prefill.hold("s", 2)
    client = decode.client("prefill", prefill.port)
    client.submit(job((0,), (5,)))
    assert decode.outcome().error is None
    prefill.server._listener.end_connections()
    client.submit(job((1,), (6,), remote_request_id="s", lease_id=2))
    assert decode.outcome().error is None
    assert all(layer[:2, 0].tolist() == [FILL + 5, FILL + 6] for layer in decode.layers)


def test_a_stranger_on_the_port_ends_nothing(stack: ExitStack, decode: Decode) -> None:
    prefill = started(stack)
    prefill.hold("r", 1)
    for noise in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b"\0\0\0\1\xc1"):
        with socket.create_connection((HOST, prefill.server.port)) as stranger:
            stranger.sendall(noise)
    decode.client("prefill", prefill.port).submit(job((0,), (0,)))
    assert decode.outcome().error is None


def test_without_the_secret_nothing_is_sent(stack: ExitStack) -> None:
    prefill = started(stack)
    prefill.hold("r", 1)
    stranger = Decode(layout(), secret="guessed")
    stack.callback(stranger.stop)
    stranger.client("prefill", prefill.port).submit(job((0,), (0,)))
    error = stranger.outcome().error
    assert isinstance(error, PairBroken)
    assert "does not know this application's secret" in str(error)


def test_a_pair_itself_wants_the_secret(stack: ExitStack) -> None:
    # Whoever knows the port from elsewhere need not ask the side channel.
    prefill = started(stack)
    with pytest.raises(PairBroken, match="secret"):
        Connection.open(
            HOST, prefill.server.port, 5, name="d", engine_id="prefill", secret="guessed"
        )


def test_a_group_meets_at_one_address_of_the_host() -> None:
    address, _ = transport_for(torch.device("cpu"), HOST, timeout_s=5).invite(HOST)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", int(address)))
    socket.create_connection((HOST, int(address))).close()


def test_one_death_breaks_one_pair(stack: ExitStack, decode: Decode) -> None:
    survivor = started(stack, engine_id="survivor")
    survivor.hold("r", 1)
    process, port = start_prefill_process("victim", FILL)
    stack.callback(process.join, 10)
    stack.callback(process.kill)
    victims, survivors = decode.client("victim", port), decode.client("survivor", survivor.port)
    victims.submit(job((0,), (0,)))
    assert decode.outcome().error is None

    process.kill()
    process.join(10)
    victims.submit(job((1,), (1,)))
    assert isinstance(decode.outcome().error, PairBroken)
    survivors.submit(job((2,), (2,)))
    assert decode.outcome().error is None


def test_a_prefill_that_hangs_is_given_up(stack: ExitStack) -> None:
    decode = Decode(layout(), timeout_s=0.5)
    stack.callback(decode.stop)
    process, port = start_prefill_process("hangs", FILL)
    stack.callback(process.join, 10)
    stack.callback(process.kill)
    client = decode.client("hangs", port)
    client.submit(job((0,), (0,)))
    assert decode.outcome().error is None

    assert process.pid is not None
    suspend(process.pid)
    for _ in range(3):
        client.submit(job((1,), (1,)))
    assert all(isinstance(decode.outcome().error, PairTimeout) for _ in range(3))


def test_a_decode_that_dies_ends_its_pair_only(stack: ExitStack, decode: Decode) -> None:
    prefill = started(stack)
    prefill.hold("r", 1)
    prefill.hold("s", 2)
    gone = Decode(layout())
    gone.client("prefill", prefill.port).submit(job((0,), (0,)))
    assert gone.outcome().error is None
    until_freed(prefill)
    gone.stop()
    decode.client("prefill", prefill.port).submit(
        job((0,), (0,), remote_request_id="s", lease_id=2)
    )
    assert decode.outcome().error is None
    deadline_s = time.monotonic() + 10
    while len(prefill.server._listener._connections) > 1:
        assert time.monotonic() < deadline_s, "the ended pair is still there"
        time.sleep(0.005)
