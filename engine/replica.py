"""An engine behind a channel: requests in from routers, each step's outputs back to who asked.

Owns which router each running request belongs to. Never knows which phase it serves: prefill and
decode say what is special about them in a `PhaseHooks`.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.stats import SchedulerStats

from engine.channel import STALL_TIMEOUT_S, RouterEnd, listen
from engine.exit_cause import EngineExit
from engine.host import EngineHost
from engine.outstanding import LOAD_INTERVAL_S, OutstandingWork
from engine.steps import StepSample, step_sample
from engine.wire import (
    AddRequest,
    Holdings,
    Kind,
    LoadReport,
    Rejection,
    ReplicaFacts,
    StepOutputs,
    Taken,
    Transferred,
    Warmed,
)
from kvtransfer.peers import KVPeer, Peers, forget
from kvtransfer.stats import PairDelta
from kvtransfer.tls import Tls

logger = logging.getLogger(__name__)

SIGN_OF_LIFE_S = 1.0
"""How often they hear from this replica if nothing has changed."""


class PhaseHooks(Protocol):
    """What a phase does beside running requests. Called in the replica's event loop."""

    def output_sent(self, router: RouterEnd, output: EngineCoreOutput) -> None: ...
    def output_orphaned(self, output: EngineCoreOutput) -> None: ...
    def released(self, request_ids: list[str]) -> None: ...
    def router_gone(self, router: RouterEnd) -> None: ...
    def stats_seen(self, stats: SchedulerStats) -> None: ...
    def num_kept(self) -> int: ...
    def forgotten(self, engine_ids: list[str]) -> None: ...


@dataclass(slots=True)
class _Running:
    router: RouterEnd
    work_s: float


@dataclass(slots=True)
class _Load:
    """The replica's own view of its load."""

    outstanding: OutstandingWork[RouterEnd] = field(default_factory=OutstandingWork)
    num_running: int = 0
    num_waiting: int = 0
    kv_usage_fraction: float = 0.0
    leaves_because: str = ""
    since_s: float = 0.0
    """When it last finished a request, or got its first: since then it is at the oldest it has."""
    step: StepSample | None = None

    def report_to(
        self, router: RouterEnd, oldest_work_s: float, *, has_suspect: bool
    ) -> LoadReport:
        return LoadReport(
            others_work_s=self.outstanding.others_s(router),
            progress_s=min(time.monotonic() - self.since_s, oldest_work_s),
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            kv_usage_fraction=self.kv_usage_fraction,
            leaves_because=self.leaves_because,
            step=self.step,
            has_suspect=has_suspect,
        )


class EngineReplica:
    """Relays between one engine core and its routers. Owns both ends' tasks; `close` ends them."""

    def __init__(self, host: EngineHost, kv: KVPeer, hooks: PhaseHooks) -> None:
        self.host = host
        self._kv = kv
        self._peers = Peers(host.core, is_idle=lambda: not self._running)
        self.address: tuple[str, int] | None = None
        self.closed_because: str | None = None
        self.ended: asyncio.Future[EngineExit] = asyncio.get_running_loop().create_future()
        """Done where the engine has ended by itself."""
        self._hooks = hooks
        self._running: dict[str, _Running] = {}
        self._routers: set[RouterEnd] = set()
        self._suspect_id: str | None = None
        """Of all running requests, the one that may make the engine fail."""
        self._load = _Load()
        self._load_changed = False
        self._transferred: dict[str, Transferred] = {}
        """By prefill engine, what routers have not been told yet."""
        self._tasks: list[asyncio.Task[None]] = []
        self._server: asyncio.AbstractServer | None = None
        # The engine core takes messages in the order they were sent; tasks that are kept here are
        # only those that still wait for the socket to take their message.
        self._sends: set[asyncio.Task[None]] = set()

    async def open(
        self,
        host_ip: str,
        secret: str,
        *,
        tls: Tls | None = None,
        stall_timeout_s: float = STALL_TIMEOUT_S,
    ) -> tuple[str, int]:
        """Starts relaying and lets routers in; returns the address they connect to.

        A router that takes nothing of what it is sent for `stall_timeout_s` is cut off.
        """
        self._server, port = await listen(
            host_ip, secret, self, tls=tls, stall_timeout_s=stall_timeout_s
        )
        self.address = (host_ip, port)
        self._tasks = [
            asyncio.create_task(self._relay(), name="engine-relay"),
            asyncio.create_task(self._tell_load(), name="engine-load"),
        ]
        return self.address

    def close(self, reason: str) -> None:
        """Ends every connection, which tells the routers at once, and lets nobody in any more."""
        self.closed_because = self.closed_because or reason
        for task in self._tasks:
            task.cancel()
        if self._server is not None:
            self._server.close()
        for router in list(self._routers):
            if router.is_open:
                router.close(reason)

    def say_leaving(self, because: str) -> None:
        """Tells every router to send nothing new, and why. What comes all the same is taken."""
        self._load.leaves_because = because
        self._report()

    def say_unready(self, engine_id: str, problem: str) -> None:
        """Tells every router that this engine cannot read from a prefill engine now, and why."""
        for router in self._routers:
            router.send(Kind.WARMED, Warmed(engine_id, problem))

    def add_transfers(self, moved: Iterable[PairDelta]) -> None:
        """Takes note of what the engine has read, to tell every router in a moment."""
        for delta in moved:
            if delta.num_transfers and delta.seconds > 0:
                engine_id = delta.remote_engine_id
                before = self._transferred.get(engine_id, Transferred(engine_id, 0, 0, 0.0))
                self._transferred[engine_id] = Transferred(
                    engine_id,
                    before.num_reads + delta.num_transfers,
                    before.num_bytes + delta.num_bytes,
                    before.seconds + delta.seconds,
                )

    @property
    def num_requests(self) -> int:
        return len(self._running)

    @property
    def kv_usage_fraction(self) -> float:
        return self._load.kv_usage_fraction

    # What routers send (engine.channel.RouterRequests).

    def facts(self) -> ReplicaFacts:
        facts = self.host.facts()
        return ReplicaFacts(
            engine_id=self._kv.engine_id,
            kv=self._kv,
            max_model_len=facts.max_model_len,
            block_size=facts.block_size,
            num_kv_blocks=facts.num_kv_blocks,
            max_num_seqs=facts.max_num_seqs,
            num_dropped_tokens=facts.num_dropped_tokens,
            kv_bytes_per_token=facts.kv_bytes_per_token,
        )

    def router_joined(self, router: RouterEnd) -> None:
        self._routers.add(router)
        router.send(Kind.STEP, StepOutputs([], self._report_to(router)))

    def add(self, router: RouterEnd, add: AddRequest) -> None:
        request = add.request
        if request.request_id in self._running:
            router.send(Kind.REJECT, Rejection(request.request_id, "this id is already running"))
            return
        if add.is_suspect and self._suspect_id is not None:
            # Two routers had the same idea. First the report, so that this one looks elsewhere.
            router.send(Kind.STEP, StepOutputs([], self._report_to(router)))
            reason = "another suspect is here"
            router.send(Kind.REJECT, Rejection(request.request_id, reason, has_suspect=True))
            return
        if not self._running:
            self._load.since_s = time.monotonic()
        self._running[request.request_id] = _Running(router, add.work_s)
        self._load.outstanding.add(router, add.work_s)
        self._load_changed = True
        if add.is_suspect:
            self._suspect_id = request.request_id
        if add.asks_load:
            router.send(Kind.TAKEN, Taken(request.request_id, self._report_to(router)))
        self._send(self._add(router, request))

    async def _add(self, router: RouterEnd, request: EngineCoreRequest) -> None:
        try:
            await self.host.core.add_request_async(request)
        except EngineDeadError:
            # Not the request's fault. The relay is about to notice it and to end the connections,
            # and routers move what the engine had: this one as well.
            pass
        except Exception as error:
            # Whatever is wrong with this request must not reach the others: it alone is refused.
            logger.exception("the engine did not take request %s", request.request_id)
            self._forget(request.request_id)
            router.send(Kind.REJECT, Rejection(request.request_id, str(error)))

    def abort(self, router: RouterEnd, request_ids: list[str]) -> None:
        running = [request_id for request_id in request_ids if self._forget(request_id)]
        if running:
            self._send(self.host.core.abort_requests_async(running))

    def warm_up(self, router: RouterEnd, peer: KVPeer) -> None:
        self._send(self._warm_up(router, peer))

    async def _warm_up(self, router: RouterEnd, peer: KVPeer) -> None:
        problem = await self._peers.warm_up(peer)
        router.send(Kind.WARMED, Warmed(peer.engine_id, problem))

    def forget(self, engine_ids: list[str]) -> None:
        self._hooks.forgotten(engine_ids)
        for engine_id in engine_ids:
            self._send(forget(self.host.core, engine_id))

    def release(self, router: RouterEnd, request_ids: list[str]) -> None:
        self._hooks.released(request_ids)

    def clear(self, router: RouterEnd, request_ids: list[str]) -> None:
        if self._suspect_id in request_ids:
            self._suspect_id = None
            self._load_changed = True

    def holdings(self, router: RouterEnd) -> Holdings:
        return Holdings(
            request_ids=[key for key, each in self._running.items() if each.router is router],
            num_requests=len(self._running),
            work_s=self._load.outstanding.total_s,
            num_in_engine=self._load.num_running + self._load.num_waiting,
            num_kept=self._hooks.num_kept(),
            kv_usage_fraction=self._load.kv_usage_fraction,
        )

    def router_gone(self, router: RouterEnd) -> None:
        self._routers.discard(router)
        mine = [key for key, running in self._running.items() if running.router is router]
        logger.info("router %s left, %d requests aborted", router.router_id, len(mine))
        self.abort(router, mine)
        self._hooks.router_gone(router)
        self._load.outstanding.forget(router)

    def _send(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._sends.add(task)
        task.add_done_callback(self._sends.discard)

    def _forget(self, request_id: str, *, was_done: bool = False) -> bool:
        oldest = next(iter(self._running), None)
        running = self._running.pop(request_id, None)
        if running is None:
            return False
        if request_id == self._suspect_id:
            self._suspect_id = None
        self._load.outstanding.complete(running.router, running.work_s)
        if was_done or request_id == oldest:
            # One that leaves from behind says nothing of how far the oldest is.
            self._load.since_s = time.monotonic()
        self._load_changed = True
        return True

    # What the engine core sends.

    async def _relay(self) -> None:
        try:
            while True:
                self._step(await self.host.core.get_output_async())
                await self._taken()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            # The engine core is gone: every router learns it now, Serve at its next health check.
            await self._engine_ended(error)

    async def _taken(self) -> None:
        """Waits for routers that take less than the engine puts out for them; so does the engine.

        One that takes nothing is cut off in the end, and then waited for no longer.
        """
        if behind := [router for router in self._routers if not router.is_drained]:
            with self.host.held():
                for router in behind:
                    await router.drained()

    async def _engine_ended(self, error: Exception) -> None:
        how = await self.host.exit() if isinstance(error, EngineDeadError) else _broken(error)
        logger.error("%s", how.text, exc_info=error)
        how = replace(how, num_requests=len(self._running))
        self.closed_because = self.closed_because or how.text
        for router in list(self._routers):
            router.close_after(Kind.ENDED, how, reason=how.text)
        self.close(how.text)
        self.ended.set_result(how)

    def _step(self, step: EngineCoreOutputs) -> None:
        if step.scheduler_stats is not None:
            self._observe(step.scheduler_stats)
            self._peers.stepped(step.scheduler_stats.kv_connector_stats)
        by_router: defaultdict[RouterEnd, list[EngineCoreOutput]] = defaultdict(list)
        for output in step.outputs:
            running = self._running.get(output.request_id)
            if running is None:
                self._hooks.output_orphaned(output)
                continue
            by_router[running.router].append(output)
            self._hooks.output_sent(running.router, output)
            if output.finished:
                self._forget(output.request_id, was_done=True)
        for router, outputs in by_router.items():
            router.send(Kind.STEP, StepOutputs(outputs, self._report_to(router)))

    def _observe(self, stats: SchedulerStats) -> None:
        load = self._load
        load.num_running = stats.num_running_reqs
        load.num_waiting = stats.num_waiting_reqs + stats.num_skipped_waiting_reqs
        load.kv_usage_fraction = stats.kv_cache_usage
        load.step = step_sample(stats) or load.step
        self._load_changed = True
        self._hooks.stats_seen(stats)

    async def _tell_load(self) -> None:
        reported_s = 0.0
        while True:
            await asyncio.sleep(LOAD_INTERVAL_S)
            self._tell_transfers()
            now_s = time.monotonic()
            if self._load_changed or now_s - reported_s >= SIGN_OF_LIFE_S:
                reported_s = now_s
                self._report()

    def _tell_transfers(self) -> None:
        if self._transferred:
            moved, self._transferred = list(self._transferred.values()), {}
            for router in self._routers:
                if router.is_drained:
                    router.send(Kind.TRANSFERRED, moved)

    def _report_to(self, router: RouterEnd) -> LoadReport:
        oldest = next(iter(self._running.values()), None)
        suspect = self._running[self._suspect_id] if self._suspect_id is not None else None
        has_suspect = suspect is not None and suspect.router is not router
        return self._load.report_to(
            router, oldest.work_s if oldest else 0.0, has_suspect=has_suspect
        )

    def _report(self) -> None:
        self._load_changed = False
        for router in self._routers:
            # To one that is behind it would be old before it is read.
            if router.is_drained:
                router.send(Kind.STEP, StepOutputs([], self._report_to(router)))


def _broken(error: Exception) -> EngineExit:
    return EngineExit(cause="error", text=f"the engine's outputs cannot be read: {error}")
