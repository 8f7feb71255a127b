"""What a replica does with what routers send, without an engine."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason

from engine.replica import EngineReplica
from engine.wire import AddRequest, Kind, LoadReport, Rejection, StepOutputs, Transferred
from kvtransfer.peers import KVPeer
from kvtransfer.stats import PairDelta


class FakeRouter:
    """Records what a replica sends to a router."""

    def __init__(self, router_id: str) -> None:
        self.router_id = router_id
        self.sent: list[tuple[Kind, Any]] = []

    is_drained = True

    def send(self, kind: Kind, message: object) -> None:
        self.sent.append((kind, message))

    @property
    def load(self) -> LoadReport:
        """As last reported."""
        load: LoadReport
        load = next(m.load for _, m in reversed(self.sent) if isinstance(m, StepOutputs))
        return load

    @property
    def rejections(self) -> list[Rejection]:
        return [message for _, message in self.sent if isinstance(message, Rejection)]


class FakeCore:
    """Records what the engine core is given."""

    def __init__(self) -> None:
        self.added: list[str] = []
        self.aborted: list[str] = []

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        self.added.append(request.request_id)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        self.aborted += request_ids


class Hooks:
    """A phase that does nothing of its own."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


class Replica:
    """A replica with two routers."""

    def __init__(self) -> None:
        self.core = FakeCore()
        peer = KVPeer(engine_id="e", host="h", port=1, tp_size=1)
        host: Any = SimpleNamespace(core=self.core)
        self.replica = EngineReplica(host, peer, Hooks())
        self.a, self.b = FakeRouter("a"), FakeRouter("b")
        for router in (self.a, self.b):
            self.replica.router_joined(router)  # type: ignore[arg-type]

    async def add(self, router: FakeRouter, request_id: str, *, is_suspect: bool = False) -> None:
        request = EngineCoreRequest(
            request_id=request_id,
            prompt_token_ids=[1],
            mm_features=None,
            sampling_params=SamplingParams(),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        self.replica.add(router, AddRequest(request, 1.0, is_suspect=is_suspect))  # type: ignore[arg-type]
        await asyncio.sleep(0)

    def report(self) -> None:
        self.replica._report()

    def ends(self, request_id: str) -> None:
        output = EngineCoreOutput(request_id, [1], finish_reason=FinishReason.STOP)
        self.replica._step(EngineCoreOutputs(outputs=[output]))


async def test_it_has_one_suspect_at_a_time_and_tells_the_other_router() -> None:
    each = Replica()
    await each.add(each.a, "first", is_suspect=True)
    await each.add(each.b, "innocent")
    await each.add(each.b, "second", is_suspect=True)
    assert each.core.added == ["first", "innocent"]
    (rejection,) = each.b.rejections
    assert (rejection.request_id, rejection.has_suspect) == ("second", True)
    assert each.b.load.has_suspect, "said before it was rejected"
    each.report()
    assert not each.a.load.has_suspect, "its own"


@pytest.mark.parametrize("how", ["cleared", "ended", "aborted", "router-gone"])
async def test_another_suspect_may_come_once_the_first_is_none_any_more(how: str) -> None:
    each = Replica()
    await each.add(each.a, "first", is_suspect=True)
    match how:
        case "cleared":
            each.replica.clear(each.a, ["first"])  # type: ignore[arg-type]
        case "ended":
            each.ends("first")
        case "aborted":
            each.replica.abort(each.a, ["first"])  # type: ignore[arg-type]
        case "router-gone":
            each.replica.router_gone(each.a)  # type: ignore[arg-type]
    each.report()
    assert not each.b.load.has_suspect
    await each.add(each.b, "second", is_suspect=True)
    assert each.core.added == ["first", "second"]
    assert each.b.rejections == []


def read_of(engine_id: str, *, num: int, num_bytes: int = 0, seconds: float = 0.0) -> PairDelta:
    return PairDelta(
        remote_engine_id=engine_id,
        num_bytes=num_bytes,
        seconds=seconds,
        num_transfers=num,
        num_copies=0,
        num_failures=1 - min(num, 1),
        num_ended_leases=0,
    )


def transfers(router: FakeRouter) -> list[list[Transferred]]:
    return [message for kind, message in router.sent if kind is Kind.TRANSFERRED]


async def test_reads_are_added_up_and_told_to_every_router_once() -> None:
    each = Replica()
    each.replica.add_transfers([read_of("p", num=1, num_bytes=4, seconds=0.5)])
    each.replica.add_transfers(
        [read_of("p", num=2, num_bytes=6, seconds=1.0), read_of("q", num=1, num_bytes=1, seconds=2)]
    )
    each.replica._tell_transfers()
    each.replica._tell_transfers()
    expected = [[Transferred("p", 3, 10, 1.5), Transferred("q", 1, 1, 2.0)]]
    assert transfers(each.a) == transfers(each.b) == expected


async def test_a_read_that_failed_says_nothing_of_what_reads_take() -> None:
    each = Replica()
    each.replica.add_transfers([read_of("p", num=0)])
    each.replica._tell_transfers()
    assert transfers(each.a) == []
