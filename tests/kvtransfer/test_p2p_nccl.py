"""Pairs over NCCL where NCCL hangs and fails: a stand-in for its library does, on command.

The stand-in copies memory within one process. What it cannot show is whether NCCL and CUDA behave
as their documents say.
"""

import ctypes
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from enum import IntEnum
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from p2p_decode import Decode, job
from p2p_prefill import PAGE_BYTES, Prefill, layout

from kvtransfer.p2p_errors import PairBroken, PairStuck, PairTimeout
from kvtransfer.p2p_fetch import PairClient
from kvtransfer.p2p_nccl import NcclTransport
from kvtransfer.p2p_worker import P2pWorker
from kvtransfer.stats import PairStats

CPU = torch.device("cpu")
SOURCE = Path(__file__).with_name("standin_nccl.c")
FILL = 100
TIMEOUT_S = 0.3
handles = count(1)


class Do(IntEnum):
    """What the stand-in makes of a call; STUCK is queued, and not done before an abort."""

    OK, HANG, FAIL, STUCK = range(4)


class StandIn:
    """The library, for commands."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def do(
        self, *, start: Do = Do.OK, send: Do = Do.OK, receive: Do = Do.OK, abort: Do = Do.OK
    ) -> None:
        self._library.standin_do(start, send, receive, abort)

    def reset(self) -> None:
        self._library.standin_reset()

    @property
    def num_aborts(self) -> int:
        return int(self._library.standin_num_aborts())

    def new_queue(self, device: torch.device) -> "StandInQueue":
        return StandInQueue(self._library)


class StandInQueue:
    """In a CUDA stream's place: torch's copies are done when they return."""

    device = CPU

    def __init__(self, library: Any) -> None:
        self._library = library
        self.handle = next(handles)

    def use(self) -> AbstractContextManager[None]:
        return nullcontext()

    def mark(self) -> Callable[[], bool]:
        return lambda: bool(self._library.standin_is_done())


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    built = tmp_path_factory.mktemp("nccl") / "libnccl.so"
    command = [compiler, "-shared", "-fPIC", "-pthread", "-o", str(built), str(SOURCE)]
    subprocess.run(command, check=True)
    return str(built)


@pytest.fixture
def nccl(library: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setenv("VLLM_NCCL_SO_PATH", library)
    stand_in = StandIn(ctypes.CDLL(library))
    stand_in.reset()
    yield stand_in
    stand_in.reset()  # Whatever still hangs goes on.


class Pair:
    """A prefill and a decode, both over the stand-in."""

    def __init__(self, stack: ExitStack, nccl: StandIn) -> None:
        self._nccl = nccl
        self.prefill = Prefill("prefill", FILL, timeout_s=5, transport=self._transport())
        stack.callback(self.prefill.stop)
        self.decode = Decode(layout(), timeout_s=5, transport=self._transport())
        stack.callback(self.decode.stop)
        self._lease_id = 0
        self.client: PairClient = self.decode.client("prefill", self.prefill.port)

    def _transport(self) -> NcclTransport:
        return NcclTransport(
            CPU,
            timeout_s=TIMEOUT_S,
            start_timeout_s=TIMEOUT_S,
            end_timeout_s=TIMEOUT_S,
            new_queue=self._nccl.new_queue,
        )

    def ask(self, local: tuple[int, ...] = (0, 1), remote: tuple[int, ...] = (5, 6)) -> None:
        """For blocks of a request that prefill holds from now on."""
        self._lease_id += 1
        self.prefill.hold(self._request_id, self._lease_id)
        wanted = {"remote_request_id": self._request_id, "lease_id": self._lease_id}
        self.client.submit(job(local, remote, **wanted))

    def fetch(self) -> BaseException | None:
        self.ask()
        return self.decode.outcome().error

    def is_given_back(self) -> bool:
        """Whether the model may have the last request's blocks again, which nobody reads."""
        self.prefill.leases.release([self._request_id])
        return self._request_id in self.prefill.leases.collect(now_s=0).read_or_released

    @property
    def _request_id(self) -> str:
        return f"request {self._lease_id}"


@pytest.fixture
def pair(nccl: StandIn) -> Iterator[Pair]:
    with ExitStack() as stack:
        stack.callback(nccl.reset)
        yield Pair(stack, nccl)


def eventually(condition: Callable[[], bool]) -> None:
    until_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.005)


def test_blocks_arrive(pair: Pair) -> None:
    local, remote = tuple(range(60)), tuple(reversed(range(4, 64)))
    pair.ask(local, remote)
    outcome = pair.decode.outcome()
    assert outcome.error is None
    assert outcome.num_bytes == 60 * PAGE_BYTES * len(pair.decode.layers)
    for layer in pair.decode.layers:
        assert layer[:60, 0].tolist() == [FILL + block for block in remote]


@pytest.mark.parametrize(
    ("start", "expected"), [(Do.HANG, PairTimeout), (Do.FAIL, PairBroken)], ids=["hangs", "fails"]
)
def test_a_start_that_comes_to_nothing_is_given_up(
    pair: Pair, nccl: StandIn, start: Do, expected: type[Exception]
) -> None:
    nccl.do(start=start)
    assert type(pair.fetch()) is expected
    # Both sides are free again; what comes too late is undone.
    eventually(lambda: not pair.prefill.server._listener._connections)
    nccl.reset()
    assert pair.fetch() is None
    if start is Do.HANG:
        eventually(lambda: nccl.num_aborts == 2)


def test_starts_that_never_end_are_not_begun_without_end(pair: Pair, nccl: StandIn) -> None:
    nccl.do(start=Do.HANG)
    errors = [pair.fetch() for _ in range(17)]
    assert all(type(error) is PairTimeout for error in errors[:16])
    assert type(errors[16]) is PairBroken
    assert "wants a restart" in str(errors[16])
    nccl.reset()
    eventually(lambda: nccl.num_aborts == 32)
    assert pair.fetch() is None


@pytest.mark.parametrize("how", [Do.HANG, Do.STUCK], ids=["in the call", "on the device"])
@pytest.mark.parametrize("side", ["send", "receive"])
def test_a_peer_that_stops_is_given_up(pair: Pair, nccl: StandIn, side: str, how: Do) -> None:
    assert pair.fetch() is None
    nccl.do(**{side: how})
    assert type(pair.fetch()) is PairTimeout
    eventually(lambda: nccl.num_aborts == 2)
    eventually(pair.is_given_back)
    nccl.reset()
    assert pair.fetch() is None


def test_what_is_sent_stays_as_it_is_until_it_cannot_be_sent_any_more(
    pair: Pair, nccl: StandIn
) -> None:
    """A kernel that outlives its communicator sends whatever is in the blocks by then."""
    assert pair.fetch() is None
    nccl.do(send=Do.STUCK, receive=Do.STUCK, abort=Do.STUCK)
    assert type(pair.fetch()) is PairStuck
    eventually(lambda: not pair.prefill.server._listener._connections)
    assert nccl.num_aborts == 2
    assert not pair.is_given_back()


def test_an_abort_that_hangs_is_not_waited_for(pair: Pair, nccl: StandIn) -> None:
    assert pair.fetch() is None
    nccl.do(send=Do.STUCK, receive=Do.STUCK, abort=Do.HANG)
    assert type(pair.fetch()) is PairStuck
    eventually(lambda: not pair.prefill.server._listener._connections)
    assert not pair.is_given_back()


@pytest.fixture
def worker(pair: Pair) -> P2pWorker:
    """The decode's, without an engine."""
    worker = P2pWorker.__new__(P2pWorker)
    worker._leases, worker._outcomes = pair.prefill.leases, pair.decode.outcomes
    worker._warm_ups, worker._clients = {}, {"prefill": pair.client}
    worker._stats = PairStats()
    return worker


def test_blocks_that_may_still_be_written_end_the_engine(
    pair: Pair, nccl: StandIn, worker: P2pWorker
) -> None:
    assert pair.fetch() is None
    nccl.do(send=Do.STUCK, receive=Do.STUCK, abort=Do.STUCK)
    pair.ask()
    eventually(lambda: not pair.decode.outcomes.empty())
    with pytest.raises(PairStuck):
        worker.get_transfer_results()


def test_a_call_that_nothing_ends_ends_the_engine(
    pair: Pair, nccl: StandIn, worker: P2pWorker
) -> None:
    assert pair.fetch() is None
    worker.get_transfer_results()
    nccl.do(send=Do.HANG, receive=Do.HANG, abort=Do.HANG)
    pair.ask()
    eventually(lambda: pair.client.is_stuck)
    with pytest.raises(PairStuck, match="engine prefill does not end"):
        worker.get_transfer_results()
    nccl.reset()
    eventually(lambda: not pair.client.is_stuck)
