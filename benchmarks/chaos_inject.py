"""Faults made real: signals to processes, redeployments, and what is seen of them at once.

Owns what was done to the cluster: who was hit, what Serve was asked for, how soon engines were free
of a dead router's requests. What clients do is done by whoever owns the clients.
"""

import asyncio
import random
import signal
import time
from collections.abc import Callable, Mapping

import psutil

from benchmarks.chaos_faults import Fault, FaultOrder, Kind, Member, live_members
from benchmarks.chaos_network import Link
from benchmarks.chaos_node import JUMP_S, MemoryPressure, Node
from benchmarks.chaos_processes import (
    count_connections,
    find_members,
    send,
    signal_process,
    still_stopped,
    suspend,
    tree_of,
)
from benchmarks.chaos_routers import Routers
from benchmarks.chaos_verdict import RouterDeath
from benchmarks.serve_api import ServeApi
from kvtransfer.phase import PHASES, Phase

FREED_TIMEOUT_S = 10.0
BLACK_HOLE_S = 15.0
"""Longer than the stall timeout of the served config."""
_FREED_POLL_S = 0.1
_SCALED_POLL_S = 1.0
_PRESSURE_POLL_S = 0.05

Live = Mapping[Phase, tuple[Member, ...]]


class Injector:
    """Hits the processes below `leader`; what has to be waited for runs in the given tasks."""

    def __init__(
        self,
        leader: psutil.Process,
        routers: Routers,
        serve_api: ServeApi,
        node: Node,
        num_replicas: Mapping[Phase, int],
    ) -> None:
        self._leader = leader
        self._node = node
        self._routers = routers
        self._serve_api = serve_api
        self._wanted: dict[str, int] = dict(num_replicas.items())
        """What Serve has been asked for, of each pool."""
        self._hit: set[int] = set()
        self._stopped: set[int] = set()
        self.router_deaths: list[RouterDeath] = []

    async def choose(self, order: FaultOrder) -> tuple[Fault | None, Live]:
        """The next fault, if any is possible now, and the live replicas that it was chosen from."""
        seen = await self._routers.look()
        # Not in a thread, though it takes a moment: one of ordinary priority that holds Python's
        # lock would keep the clients from reading for far longer.
        members = find_members(self._leader)
        live = {
            pool: live_members(
                members[pool],
                num_live=seen.num_live[pool] if seen else 0,
                already_hit=frozenset(self._hit),
            )
            for pool in PHASES
        }
        num_live = {pool: len(live[pool]) for pool in PHASES}
        return order.next(num_live, num_routers=len(self._routers.live)), live

    async def inject(
        self,
        fault: Fault,
        live: Live,
        *,
        tasks: asyncio.TaskGroup,
        rng: random.Random,
        held_s: float,
    ) -> str | None:
        """Carries out a fault of the cluster; returns who was hit, or None if it came too late.

        A node stays for `held_s` as the fault has left it.
        """
        if fault.kind is Kind.KILL_ROUTER:
            return self._kill_router(tasks, rng)
        if fault.kind.is_of_network:
            return self._part(fault.kind, live, tasks, rng)
        if fault.kind.is_of_node:
            return self._change_node(fault.kind, tasks, held_s)
        assert fault.pool is not None, "the others are for clients to carry out"
        if fault.kind is Kind.SCALE_DOWN:
            return await self._scale_down(tasks, fault.pool)
        if fault.kind is Kind.CROWD and len(live[fault.pool]) == 1:
            return "the only decode replica, which is left alone"
        victim = rng.choice(live[fault.pool])
        if fault.kind is Kind.MEMORY_PRESSURE:
            return self._press(tasks, fault.pool, victim)
        pid = send(fault.kind, victim)
        if pid is None:
            return None
        self._hit.add(victim.pid)
        if fault.kind is Kind.STOP_ENGINE:
            self._stopped.add(pid)
        return f"{fault.pool}, process {pid}"

    async def kill_one(self, pool: Phase) -> None:
        """Kills the oldest replica of a pool that is whole."""
        victim = min(find_members(self._leader)[pool], key=lambda member: member.created_s)
        send(Kind.KILL_REPLICA, victim)
        self._hit.add(victim.pid)

    def never_replaced(self) -> list[int]:
        """Engines that were stopped and are still there."""
        return still_stopped(self._stopped)

    async def _scale_down(self, tasks: asyncio.TaskGroup, pool: Phase) -> str:
        self._wanted[pool] -= 1
        await self._serve_api.scale(self._wanted)
        tasks.create_task(self._scale_up(pool))
        return f"{pool}, whichever replica Serve takes"

    async def _scale_up(self, pool: Phase) -> None:
        """Once the replica that left is gone, asks for another."""
        while True:
            await asyncio.sleep(_SCALED_POLL_S)
            left = [each for each in await self._serve_api.replicas() if each.deployment == pool]
            if len(left) <= self._wanted[pool]:
                break
        self._wanted[pool] += 1
        await self._serve_api.scale(self._wanted)

    def _part(
        self, kind: Kind, live: Live, tasks: asyncio.TaskGroup, rng: random.Random
    ) -> str | None:
        """Parts two processes that belong together, drawn from those that live."""
        if not all(live.values()):
            return None
        prefill, decode = (rng.choice(live[pool]) for pool in PHASES)
        if kind is Kind.CUT_KV:
            one, other = prefill.engine_pid, decode.engine_pid
            names = f"prefill engine {one} and decode engine {other}"
        else:
            one, other = rng.choice(self._routers.live).pid, rng.choice((prefill, decode)).pid
            names = f"router {one} and replica {other}"
        if one is None or other is None:
            return None
        try:
            link = Link(one, other)
        except (OSError, ProcessLookupError):
            return None
        if kind is Kind.BLACK_HOLE:
            link.black_hole()
            tasks.create_task(_lift(link))
        else:
            link.cut()
            link.close()
        return f"{names}, {link.num_connections} connections"

    def _change_node(self, kind: Kind, tasks: asyncio.TaskGroup, held_s: float) -> str:
        clock, disk, pid = self._node.clock, self._node.disk, self._leader.pid
        if kind is Kind.CLOCK_JUMP:
            assert clock is not None, "it is left out then"
            clock.step(JUMP_S)
            tasks.create_task(_later(held_s, lambda: clock.step(0)))
            return f"by {JUMP_S} s, and back after {held_s:.0f} s"
        assert disk is not None, "it is left out then"
        disk.fill(pid)
        tasks.create_task(_later(held_s, lambda: disk.empty(pid)))
        return f"for {held_s:.0f} s"

    def _press(self, tasks: asyncio.TaskGroup, pool: Phase, victim: Member) -> str | None:
        assert self._node.memory is not None, "it is left out then"
        pids = tree_of(victim.pid)
        if not pids:
            return None
        self._hit.add(victim.pid)
        tasks.create_task(self._lift_pressure(self._node.memory.press(pids), victim.pid))
        return f"{pool}, replica {victim.pid} of {len(pids)} processes"

    async def _lift_pressure(self, pressure: MemoryPressure, victim_pid: int) -> None:
        try:
            while not pressure.is_over:  # noqa: ASYNC110  the kernel sets no event
                await asyncio.sleep(_PRESSURE_POLL_S)
        finally:
            pressure.lift()
            # The kernel may have ended the ballast, and the replica lives on.
            self._hit.discard(victim_pid)

    def _kill_router(self, tasks: asyncio.TaskGroup, rng: random.Random) -> str | None:
        victim = rng.choice(self._routers.live)
        # Stopped first, so that no request comes between the count and the end.
        if not suspend(victim.pid):
            return None
        num_connections = count_connections(victim)
        at_s = time.monotonic()
        signal_process(victim.pid, signal.SIGKILL)
        tasks.create_task(self._await_freed(at_s, num_connections))
        return f"router {victim.pid}, which had {num_connections} connections"

    async def _await_freed(self, at_s: float, num_connections: int) -> None:
        """Waits until the engines have no more than what the other routers sent them."""
        freed_after_s = None
        while freed_after_s is None and time.monotonic() < at_s + FREED_TIMEOUT_S:
            await asyncio.sleep(_FREED_POLL_S)
            seen = await self._routers.look()
            if seen is not None and sum(seen.num_in_engine.values()) <= seen.num_sent:
                freed_after_s = time.monotonic() - at_s
        self.router_deaths.append(
            RouterDeath(at_s=at_s, num_connections=num_connections, freed_after_s=freed_after_s)
        )


async def _lift(link: Link) -> None:
    await asyncio.sleep(BLACK_HOLE_S)
    link.close()


async def _later(after_s: float, undo: Callable[[], None]) -> None:
    try:
        await asyncio.sleep(after_s)
    finally:
        undo()
