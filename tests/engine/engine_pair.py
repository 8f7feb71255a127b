"""A prefill and a decode scheduler with our connector between them, and KV that is copied.

The connector's scheduler sides are the real ones; what stands for its workers is here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from counting_engine import CountingEngine, Mode
from fake_runner import FakeRunner
from vllm import SamplingParams
from vllm.v1.outputs import KVConnectorOutput

from kvtransfer.config import kv_transfer_config
from kvtransfer.nixl import num_dropped_tokens
from kvtransfer.phase import Phase
from router.routes import Route, plan_route

HANDOVER = {"do_remote_decode": True, "do_remote_prefill": False}


class Kept:
    """Prefill's side. Owns which requests' blocks are kept, and which of them were read."""

    def __init__(self) -> None:
        self._kept: set[str] = set()
        self._read: set[str] = set()

    def read(self, request_id: str) -> None:
        self._read.add(request_id)

    def __call__(self, orders: Any) -> KVConnectorOutput:
        self._kept |= orders.reqs_to_send.keys()
        sent = self._kept & self._read
        self._kept -= sent
        return KVConnectorOutput(finished_sending=sent)


@dataclass
class _Read:
    request_id: str
    orders: Any
    num_steps: int


class Reads:
    """Decode's side. Owns the reads under way, each of which takes so many steps, and may fail."""

    def __init__(self, runner: FakeRunner, prefill: FakeRunner, kept: Kept) -> None:
        self.num_steps = 2
        self.failing: set[str] = set()
        """Ids of requests whose reads fail."""
        self.under_way: list[_Read] = []
        self._runner = runner
        self._prefill = prefill
        self._kept = kept

    def __call__(self, orders: Any) -> KVConnectorOutput:
        done, failed = set(), set()
        for read in list(self.under_way):
            read.num_steps -= 1
            if read.num_steps <= 0:
                self.under_way.remove(read)
                is_read = self._copy(read)
                if not read.orders.awaiting_kvs:
                    continue  # prefill was only told
                done.add(read.request_id)
                if not is_read:
                    failed.add(read.request_id)
        for request_id, each in orders.reqs_to_recv.items():
            self.under_way.append(_Read(request_id, each, self.num_steps))
        return KVConnectorOutput(finished_recving=done, failed_recving=failed)

    def _copy(self, read: _Read) -> bool:
        orders = read.orders
        if read.request_id in self.failing:
            return False
        if any(orders.local_block_ids):
            (local,), (remote,) = orders.local_block_ids, orders.remote.block_ids
            self._runner.copy_from(self._prefill, local, remote[-len(local) :])
        self._kept.read(orders.remote.request_id)
        return True


class EnginePair:
    """Two engines and the little of a router that hands requests from one to the other."""

    def __init__(
        self, mode: Mode, *, num_blocks: int = 60, num_decode_blocks: int | None = None, **how: Any
    ) -> None:
        def engine(role: Phase, blocks: int) -> CountingEngine:
            transfer = kv_transfer_config(role, engine_id=role, lease_s=300, backends=["UCX"])
            return CountingEngine(blocks, mode=mode, kv_transfer_config=transfer, **how)

        self.prefill = engine("prefill", num_blocks)
        self.decode = engine("decode", num_decode_blocks or num_blocks)
        self._kept = Kept()
        self.reads = Reads(self.decode.runner, self.prefill.runner, self._kept)
        self.prefill.runner.transfers = self._kept
        self.decode.runner.transfers = self.reads
        self.num_dropped = num_dropped_tokens(
            self.prefill.config, self.prefill.scheduler.kv_cache_config
        )
        self.tokens: dict[str, list[int]] = {}
        """What the client got."""
        self._asked: dict[str, tuple[int, int, bool, str | None]] = {}
        self.aborted: set[str] = set()
        self._handed_over: set[str] = set()

    def ask(
        self, request_id: str, num_tokens: int, num_more: int, *, regex: str | None = None
    ) -> None:
        """`regex` is what the answer must match."""
        plan = plan_route(
            SamplingParams(max_tokens=num_more),
            num_tokens=num_tokens,
            num_dropped_tokens=self.num_dropped,
        )
        streams = plan.route is Route.PREFILL_FIRST
        self._asked[request_id] = num_tokens, num_more, streams, regex
        self.tokens[request_id] = []
        _add(self.prefill, request_id, num_tokens, 1, regex, kv=dict(HANDOVER))

    def abort(self, request_id: str) -> None:
        """Wherever it is by now; what prefill keeps of it is not needed."""
        self.aborted.add(request_id)
        self._kept.read(request_id)
        for engine in (self.prefill, self.decode):
            if request_id in engine.tokens and engine.has_work:
                engine.abort(request_id)

    def frees_late(self, request_id: str) -> None:
        """Prefill keeps it until the lease ends, which is at once here."""
        self._kept.read(request_id)

    def run(self, max_steps: int = 400) -> None:
        for _ in self.steps(max_steps):
            pass

    def steps(self, max_steps: int = 400) -> Iterator[None]:
        """Steps both engines until nothing is left to do."""
        for _ in range(max_steps):
            if not (self.prefill.has_work or self.decode.has_work):
                return
            self.step()
            yield
        raise AssertionError(f"{self.prefill.ended} and {self.decode.ended} have ended")

    def step(self) -> None:
        for engine in (self.prefill, self.decode):
            if engine.has_work:
                engine.step_as_engine_core()
        for request_id in set(self.prefill.last) - self._handed_over:
            self._handed_over.add(request_id)
            if request_id not in self.aborted:
                self._hand_over(request_id)
        for request_id in self.decode.tokens:
            given = self.prefill.tokens[request_id] if self._asked[request_id][2] else []
            self.tokens[request_id] = [*given, *self.decode.tokens[request_id]]

    def _hand_over(self, request_id: str) -> None:
        num_tokens, num_more, streams, regex = self._asked[request_id]
        given = tuple(self.prefill.tokens[request_id]) if streams else ()
        _add(
            self.decode,
            request_id,
            num_tokens,
            num_more - len(given),
            regex,
            given=given,
            kv=self.prefill.last[request_id].kv_transfer_params,
        )

    def check_settled(self) -> None:
        assert self.reads.under_way == []
        for engine in (self.prefill, self.decode):
            engine.check_settled()
            engine.scheduler.shutdown()


def _add(
    engine: CountingEngine,
    request_id: str,
    num_tokens: int,
    num_more: int,
    regex: str | None,
    **how: Any,
) -> None:
    if regex is None:
        engine.add(request_id, num_tokens, num_more, **how)
    else:
        engine.constrained(request_id, num_tokens, num_more, regex, **how)
