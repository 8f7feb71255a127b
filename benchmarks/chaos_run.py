"""A chaos run: undisturbed answers, then load and faults at once, then what is left of them.

Owns the order of things while the cluster runs, and the requests that are under way. Starts and
ends no cluster, judges nothing.
"""

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from benchmarks.chaos_answers import Answer, differences
from benchmarks.chaos_cases import UNREAD, Case, base_cases, crowd_cases, stop_case
from benchmarks.chaos_client import Client, Outcome
from benchmarks.chaos_failover import NUM_REQUESTS, measure_failover
from benchmarks.chaos_faults import POOLS, Fault, FaultOrder, Kind, PoolName
from benchmarks.chaos_inject import Injector
from benchmarks.chaos_memory import MemoryWatch
from benchmarks.chaos_metrics import Scrape
from benchmarks.chaos_node import Node
from benchmarks.chaos_pace import NUM_CROWD, Pace, Pressure, Speed, plan_pace
from benchmarks.chaos_poison import poison
from benchmarks.chaos_processes import find_stray_engines, rss_bytes
from benchmarks.chaos_routers import Routers
from benchmarks.chaos_verdict import Injected, Record, Sample, Unread
from benchmarks.serve_api import ServeApi
from benchmarks.systems import RunningSystem, SystemFailedError

START_TIMEOUT_S = 900.0
"""Until there is a speed to go by, for all that is waited for; a machine may be slow."""
FREE_TIMEOUT_S = 15.0
BURST_S = 1.0
"""How long before a fault its burst begins, so that it finds requests in every phase."""
NUM_LEAVING = 8
_CROWD_STARTS = 0.15
"""How long after a crowd has come one of its replicas ends, in starts of an engine."""

_STOPPED_CASES = ("greedy", "greedy-whole", "seed", "chat")
"""Cases that are also sent with a stop string, taken from their own answer."""
_SALTED = 0.75
"""The share of requests that no prefix cache may answer: their KV has to be made and moved."""
_WATCH_S = 1.0
_MEMORY_S = 5.0


class ChaosError(RuntimeError):
    """There is no result: the cluster was not even right while it was left alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What is put on the cluster of `config`, which has `num_replicas` of each pool when whole.

    With `poisons` one more request comes at the end, whose every engine is killed. `left_out` says
    why kinds that were asked for are not among `kinds`.
    """

    least_s: float
    pressure: Pressure
    burst: int
    seed: int
    kinds: tuple[Kind, ...]
    spare_last: bool
    num_replicas: dict[PoolName, int]
    num_routers: int
    poisons: bool
    config: Path
    left_out: Mapping[Kind, str] = field(default_factory=dict)


class ChaosRun:
    """Owns the outcomes, the faults and the samples of one run on one running cluster."""

    def __init__(
        self, system: RunningSystem, node: Node, options: RunOptions, say: Callable[[str], None]
    ) -> None:
        self._system = system
        self._node = node
        self._leader = psutil.Process(system.process.pid)
        self._injector: Injector
        """Made once the cluster says where its dashboard is."""
        self._routers = Routers(self._leader, num_expected=options.num_routers)
        self._memory = MemoryWatch(self._leader)
        self._options = options
        self._say = say
        self._client = Client(system.url, timeout_s=START_TIMEOUT_S)
        self._speed: Speed
        self._pace: Pace
        """Planned once it is known how fast the cluster is."""
        self._crowd: tuple[Case, ...] = ()
        self._cases: list[Case] = []
        self._expected: dict[str, Answer] = {}
        self._outcomes: list[Outcome] = []
        self._faults: list[Injected] = []
        self._samples: list[Sample] = []
        self._unread: list[Unread] = []
        self._errors: set[str] = set()
        """Those that have been told."""
        self._num_sent = 0
        self._salts = random.Random(f"{options.seed} salts")

    async def run(self) -> Record:
        """All of it.

        Raises:
            ChaosError: the cluster did not start, or answers differently without any fault.
            SystemFailedError: the cluster's own process ended.
        """
        if await self._await_whole(START_TIMEOUT_S) is None:
            raise ChaosError(f"not ready: {self._system.log_tail()}")
        serve_api = ServeApi(self._system.log, self._options.config)
        self._injector = Injector(
            self._leader, self._routers, serve_api, self._node, self._options.num_replicas
        )
        await self._learn_answers()
        self._say(f"{len(self._cases)} cases have their answers; measuring the machine's speed")
        self._speed = speed = await self._measure_speed()
        options = self._options
        self._pace = plan_pace(speed, options.pressure, least_s=options.least_s)
        self._crowd = crowd_cases(self._pace.crowd_tokens)
        if Kind.CROWD in options.kinds:
            for case in self._crowd:
                self._expected[case.name] = await self._undisturbed(case)
        self._client = Client(self._system.url, timeout_s=self._pace.timeout_s)
        start_s = time.monotonic()
        self._say(
            f"a start takes {speed.start_s:.0f} s, and {speed.rate:.1f} requests/s are answered"
            f" meanwhile; now {self._pace.rate:.2f} a second for {self._pace.duration_s:.0f} s"
            f" and a fault every {self._pace.fault_every_s:.0f} s"
        )
        try:
            async with asyncio.TaskGroup() as background:
                watch = background.create_task(self._watch())
                await self._disturb(start_s)
                end_s = time.monotonic()
                self._say("all requests have ended; waiting for whole pools that hold nothing")
                whole_after_s, last = await self._settle()
                watch.cancel()
                failovers = []
                for pool in POOLS if whole_after_s is not None else ():
                    self._say(f"{pool}: an engine ends under {NUM_REQUESTS} requests")
                    failovers.append(await measure_failover(self._client, serve_api, pool))
                    whole_after_s, last = await self._settle()
                poisoned = None
                if self._options.poisons and whole_after_s is not None:
                    self._say("one more request, whose every engine is killed")
                    poisoned, innocent = await poison(
                        self._routers,
                        serve_api,
                        [case for case in self._cases if case.streamed],
                        timeout_s=self._pace.timeout_s,
                    )
                    self._outcomes += innocent
                    whole_after_s, last = await self._settle()
        except* SystemFailedError as failures:
            raise failures.exceptions[0] from None
        return Record(
            speed=speed,
            pace=self._pace,
            start_s=start_s,
            end_s=end_s,
            faults=tuple(self._faults),
            outcomes=tuple(self._outcomes),
            expected=self._expected,
            samples=tuple(self._samples),
            whole_after_s=whole_after_s,
            held=self._held(last),
            router_deaths=tuple(self._injector.router_deaths),
            unread=tuple(self._unread),
            poison=poisoned,
            failovers=tuple(failovers),
            growths=self._memory.growths(start_s=start_s, end_s=end_s),
        )

    async def _learn_answers(self) -> None:
        """Asks every case alone, then all at once: without a fault, load may change nothing."""
        self._cases = list(base_cases())
        for case in self._cases:
            self._expected[case.name] = await self._undisturbed(case)
        for case in [case for case in self._cases if case.name in _STOPPED_CASES]:
            stopped = stop_case(case, self._expected[case.name].choices[0].text)
            self._expected[stopped.name] = await self._undisturbed(stopped)
            self._cases.append(stopped)
        self._expected[UNREAD.name] = await self._undisturbed(UNREAD)
        again = await asyncio.gather(*(self._undisturbed(case) for case in self._cases))
        for case, answer in zip(self._cases, again, strict=True):
            if lines := differences(self._expected[case.name], answer):
                raise ChaosError(f"{case.name} has two answers without a fault: {lines[0]}")

    async def _undisturbed(self, case: Case) -> Answer:
        outcome = await self._client.ask(case)
        if outcome.answer is None:
            raise ChaosError(f"{case.name} fails without a fault: {outcome.error}")
        return outcome.answer

    async def _measure_speed(self) -> Speed:
        """Kills a replica of each pool and asks every case at once while others start.

        In a run several often start at once, beside answers: one alone is far sooner there.

        Raises:
            ChaosError: none has started.
        """
        start_s = time.monotonic()
        for pool in POOLS:
            await self._injector.kill_one(pool)
        answers = await asyncio.gather(*(self._undisturbed(case) for case in self._cases))
        answered_s = time.monotonic()
        if await self._await_whole(START_TIMEOUT_S) is None:
            raise ChaosError("replicas that were killed are not replaced")
        num_tokens = sum(answer.completion_tokens or 0 for answer in answers)
        return Speed(
            start_s=time.monotonic() - start_s,
            rate=len(self._cases) / (answered_s - start_s),
            token_rate=num_tokens / (answered_s - start_s),
        )

    async def _disturb(self, start_s: float) -> None:
        """Load and faults, until every request has ended."""
        async with asyncio.TaskGroup() as tasks:
            until_s = start_s + self._pace.duration_s
            tasks.create_task(self._put_load(tasks, until_s=until_s))
            tasks.create_task(self._inject_faults(tasks, start_s=start_s))

    # Load.

    async def _put_load(self, tasks: asyncio.TaskGroup, *, until_s: float) -> None:
        """Poisson arrivals: the next comes when it comes, whatever the cluster makes of these."""
        rng = random.Random(f"{self._options.seed} load")
        due_s = time.monotonic()
        while (due_s := due_s + rng.expovariate(self._pace.rate)) < until_s:
            await _sleep_until(due_s)
            tasks.create_task(self._send(rng.choice(self._cases)))

    async def _send(
        self,
        case: Case,
        *,
        delay_s: float = 0.0,
        leave_after: int | None = None,
        pause_s: float = 0.0,
    ) -> None:
        await asyncio.sleep(delay_s)
        self._num_sent += 1
        salt = f"{self._options.seed} {self._num_sent}" if self._salts.random() < _SALTED else None
        outcome = await self._client.ask(
            case, cache_salt=salt, leave_after=leave_after, pause_s=pause_s
        )
        self._outcomes.append(outcome)
        if outcome.error is not None and outcome.error not in self._errors:
            self._errors.add(outcome.error)
            self._say(f"{case.name} has no answer, the first such: {outcome.error}")

    # Faults.

    async def _inject_faults(self, tasks: asyncio.TaskGroup, *, start_s: float) -> None:
        options, every_s = self._options, self._pace.fault_every_s
        rng = random.Random(f"{options.seed} faults")
        order = FaultOrder(rng, options.kinds, spare_last=options.spare_last)
        for number in range(1, int(self._pace.duration_s / every_s) + 1):
            at_s = start_s + number * every_s
            if at_s >= start_s + self._pace.duration_s:
                return
            await _sleep_until(at_s - BURST_S)
            for _ in range(options.burst):
                delay_s = rng.uniform(0.0, BURST_S)
                tasks.create_task(self._send(rng.choice(self._cases), delay_s=delay_s))
            await _sleep_until(at_s)
            await self._inject_next(tasks, order, rng)

    async def _inject_next(
        self, tasks: asyncio.TaskGroup, order: FaultOrder, rng: random.Random
    ) -> None:
        fault, live = await self._injector.choose(order)
        if fault is None:
            self._say("no fault: no pool may lose a replica now")
            return
        if fault.kind is Kind.CROWD:
            await self._let_crowd_in(tasks, rng)
        at_s = time.monotonic()
        if fault.kind.is_of_clients:
            target: str | None = self._disturb_as_client(tasks, fault.kind, rng)
        else:
            target = await self._injector.inject(
                fault, live, tasks=tasks, rng=rng, held_s=self._pace.held_s
            )
        if target is None:
            self._say(f"no fault: {fault.kind.value} came too late")
            return
        num_live = {pool: len(live[pool]) for pool in POOLS}
        self._note(fault, at_s=at_s, target=target, num_live=num_live)

    def _disturb_as_client(self, tasks: asyncio.TaskGroup, kind: Kind, rng: random.Random) -> str:
        if kind is Kind.SLOW_READER:
            tasks.create_task(self._send(UNREAD, pause_s=self._pace.unread_s))
            tasks.create_task(self._measure_unread())
            return f"reads nothing for {self._pace.unread_s:.0f} s"
        streams = [case for case in self._cases if case.streamed]
        for _ in range(NUM_LEAVING):
            leave_after = rng.randint(1, 60)
            tasks.create_task(self._send(rng.choice(streams), leave_after=leave_after))
        return f"{NUM_LEAVING} streams"

    async def _let_crowd_in(self, tasks: asyncio.TaskGroup, rng: random.Random) -> None:
        for _ in range(NUM_CROWD):
            delay_s = rng.uniform(0.0, BURST_S)
            tasks.create_task(self._send(rng.choice(self._crowd), delay_s=delay_s))
        await asyncio.sleep(BURST_S + _CROWD_STARTS * self._speed.start_s)

    async def _measure_unread(self) -> None:
        before = {router.pid: rss_bytes(router.pid) for router in self._routers.live}
        num_before = len(self._outcomes)
        await asyncio.sleep(self._pace.unread_s)
        grown = [
            now - then
            for pid, then in before.items()
            if then is not None and (now := rss_bytes(pid)) is not None
        ]
        num_others = len(self._outcomes) - num_before
        self._unread.append(Unread(grown_bytes=max(grown, default=0), num_others=num_others))

    def _note(
        self, fault: Fault, *, at_s: float, target: str, num_live: dict[PoolName, int]
    ) -> None:
        self._faults.append(
            Injected(at_s=at_s, kind=fault.kind, pool=fault.pool, target=target, num_live=num_live)
        )
        num_broken = sum(outcome.error is not None for outcome in self._outcomes)
        live = ", ".join(f"{pool} {num}" for pool, num in num_live.items())
        self._say(
            f"{fault.kind.value:13}  {target}; live: {live}; {len(self._outcomes)} requests ended,"
            f" {num_broken} without an answer, {self._num_sent - len(self._outcomes)} under way"
        )

    # What is seen of the cluster.

    async def _watch(self) -> None:
        memory_at_s = 0.0
        while True:
            self._system.check_alive()
            await self._look()
            if (now_s := time.monotonic()) >= memory_at_s:
                self._memory.look(now_s)
                memory_at_s = now_s + _MEMORY_S
            await asyncio.sleep(_WATCH_S)

    async def _look(self) -> Scrape | None:
        if (seen := await self._routers.look()) is not None:
            self._samples.append(Sample(at_s=time.monotonic(), seen=seen))
        return seen

    async def _settle(self) -> tuple[float | None, Scrape | None]:
        """The seconds until the pools are whole, or None, and what is held after that."""
        whole_after_s = await self._await_whole(self._pace.timeout_s)
        return whole_after_s, await self._await_free()

    async def _await_whole(self, timeout_s: float) -> float | None:
        """Waits for all routers and replicas; returns the seconds, or None if too many."""
        start_s = time.monotonic()
        while (waited_s := time.monotonic() - start_s) < timeout_s:
            self._system.check_alive()
            seen = await self._routers.look()
            whole = seen is not None and seen.num_live == self._options.num_replicas
            if whole and self._routers.are_complete:
                return waited_s
            await asyncio.sleep(_WATCH_S)
        return None

    async def _await_free(self) -> Scrape | None:
        """The first look at which nothing is held, or the last one that was to be had."""
        deadline_s = time.monotonic() + FREE_TIMEOUT_S
        last = None
        while time.monotonic() < deadline_s:
            last = await self._look() or last
            if last is not None:
                last = replace(last, held=(*last.held, *await self._routers.audit()))
            if last is not None and not last.held:
                break
            await asyncio.sleep(_WATCH_S)
        return last

    def _held(self, last: Scrape | None) -> tuple[str, ...]:
        blocks = last.held if last is not None else ("the router does not answer",)
        strays = [f"engine {pid} without a replica" for pid in find_stray_engines(self._leader)]
        stopped = [
            f"stopped engine {pid} never replaced" for pid in self._injector.never_replaced()
        ]
        return (*blocks, *strays, *stopped)


async def _sleep_until(at_s: float) -> None:
    await asyncio.sleep(at_s - time.monotonic())
