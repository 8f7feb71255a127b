"""Making a pair of engines ready before its first request, and parting it when one is gone.

Owns the way from an engine core's client to the connector beside the model. Never decides which
engines make a pair.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from kvtransfer.stats import WarmedWorker, warmed_workers

_IDLE_POLL_S = 0.01
_STALLED_POLL_S = 1.0
"""An engine with requests makes steps. One that makes none for so long is asked all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVPeer:
    """A prefill engine, as a decode engine finds it."""

    engine_id: str
    host: str
    port: int
    """Of its side channel."""
    tp_size: int


class _WarmUp:
    """One that is under way. Owned by `Peers`."""

    task: asyncio.Task[str | None]

    def __init__(self) -> None:
        self.problems: dict[int, str | None] = {}
        """By rank, of the workers that are done."""
        self.heard = asyncio.Event()

    def hear(self, worker: WarmedWorker) -> None:
        self.problems[worker.rank] = worker.problem
        self.heard.set()


class Peers:
    """The prefill engines of one decode engine. Owns the warm-ups under way, one for each pair.

    With several workers each call to them waits for the steps that were begun, so that an engine in
    the midst of its steps is called once: its workers say in a step's stats that they are done.
    Only one that makes no steps is asked again.
    """

    def __init__(
        self, core: Any, *, is_idle: Callable[[], bool] = lambda: True, timeout_s: float = 15.0
    ) -> None:
        """`core` is the decode engine's vLLM `AsyncMPClient`."""
        self._core, self._is_idle, self._timeout_s = core, is_idle, timeout_s
        self._under_way: dict[str, _WarmUp] = {}
        """By engine, as the workers have them, whose address only the first to ask has named."""
        self._num_steps = 0

    async def warm_up(self, peer: KVPeer) -> str | None:
        """Does all that the pair's first transfer would do, except the transfer; once for all.

        Returns None when the pair is ready and else what keeps it apart, in one line: nobody there,
        another engine, another layout of the KV, no answer in time. A pair that is ready is left as
        it is. Takes tens of milliseconds, and seconds where the peer does not answer.
        """
        if (warm_up := self._under_way.get(peer.engine_id)) is None:
            warm_up = self._under_way[peer.engine_id] = _WarmUp()
            warm_up.task = asyncio.create_task(self._warm_up(peer, warm_up))
            warm_up.task.add_done_callback(lambda _: self._under_way.pop(peer.engine_id))
        return await asyncio.shield(warm_up.task)  # Others may wait for it too.

    def stepped(self, kv_connector_stats: Mapping[str, Any] | None) -> None:
        """To be called with `SchedulerStats.kv_connector_stats` of each of the engine's steps."""
        self._num_steps += 1
        for engine_id, workers in warmed_workers(kv_connector_stats):
            if (warm_up := self._under_way.get(engine_id)) is not None:
                for worker in workers:
                    warm_up.hear(worker)

    async def _warm_up(self, peer: KVPeer, warm_up: _WarmUp) -> str | None:
        try:
            async with asyncio.timeout(self._timeout_s):
                while not await self._is_warm(peer, warm_up):
                    pass
        except TimeoutError:
            return f"the KV of engine {peer.engine_id} was not ready after {self._timeout_s:g} s"
        return next((problem for problem in warm_up.problems.values() if problem is not None), None)

    async def _is_warm(self, peer: KVPeer, warm_up: _WarmUp) -> bool:
        """Asks once, and then hears what the steps say for as long as there are any."""
        address = (peer.engine_id, peer.host, peer.port, peer.tp_size)
        answers = await self._core.collective_rpc_async("warm_up_kv_peer", args=address)
        for rank, is_done, problem in answers:
            if is_done:
                warm_up.hear(WarmedWorker(rank=rank, problem=problem))
        num_steps = self._num_steps
        while len(warm_up.problems) < len(answers):
            warm_up.heard.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(_IDLE_POLL_S if self._is_idle() else _STALLED_POLL_S):
                    await warm_up.heard.wait()
            if not warm_up.heard.is_set() and self._num_steps == num_steps:
                return False
            num_steps = self._num_steps
        return True


async def warm_up(core: Any, peer: KVPeer, *, timeout_s: float = 15.0) -> str | None:
    """As `Peers.warm_up`, of an engine that has nothing else to do."""
    return await Peers(core, timeout_s=timeout_s).warm_up(peer)


async def forget(core: Any, engine_id: str) -> None:
    """Drops what a decode engine keeps of a prefill engine that is gone; it need not know it.

    What is still being read of it ends as it can; new reads fail at once, and are computed.
    """
    await core.collective_rpc_async("forget_kv_peer", args=(engine_id,))
