"""A fuzz run on a running cluster: good answers alone, then the mix, round by round.

Owns the order of things and what is under way. Starts and ends no cluster, judges nothing.
"""

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx
import psutil

from benchmarks.chaos_cases import Case
from benchmarks.chaos_client import Client
from benchmarks.chaos_routers import Routers
from benchmarks.fuzz.aftermath import replace_one
from benchmarks.fuzz.audit import audit
from benchmarks.fuzz.client import Gun
from benchmarks.fuzz.good import CASES, Alone, learn
from benchmarks.fuzz.mix import ROUND, Mix, Slot
from benchmarks.fuzz.schema import Api
from benchmarks.fuzz.shots import Kind
from benchmarks.fuzz.verdict import Asked, Fired, Held, Record, faults, judge
from benchmarks.fuzz.watch import Ended, Listener, Watch
from benchmarks.systems import RunningSystem
from cluster.sections import SloConfig
from kvtransfer.phase import Phase

_START_TIMEOUT_S = 900.0
_PATIENCE_FOR_STARTS = 5
"""How long a replica may take to be replaced, in starts of the whole cluster."""
_POLL_S = 1.0
_SUSPECT_S = 2.0
"""Who ended so long before a process did may have ended it."""
_LEAST_PATIENCE_S = 30.0
_PATIENCE = 100
"""How long a client waits, in times of the slowest good request alone."""
_REPORTS_S = 3.0
"""Replicas report their load about every second."""
_REST = 20
"""And how long everything may take to be let go, in the same."""


class FuzzError(RuntimeError):
    """There is no result: the cluster did not start, or ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """What is sent to a cluster that has `num_replicas` of each pool, and for how long.

    With `only` these numbers are sent, one after the other, and nothing else.
    """

    seconds: float
    seed: int
    num_at_once: int
    kinds: tuple[Kind, ...]
    only: tuple[int, ...]
    num_replicas: dict[Phase, int]
    num_routers: int
    slo: SloConfig


class FuzzRun:
    """Owns what one run on one running cluster has seen so far."""

    def __init__(
        self, system: RunningSystem, options: RunOptions, say: Callable[[str], None]
    ) -> None:
        self._system = system
        self._options = options
        self._say = say
        leader = psutil.Process(system.process.pid)
        self._leader = leader
        self._watch = Watch(leader)
        self._routers = Routers(leader, num_expected=options.num_routers)
        self._client = Client(system.url, timeout_s=_START_TIMEOUT_S)
        self._alone: dict[str, Alone] = {}
        self.mix: Mix
        """Made once the cluster has told its schema."""
        self._gun: Gun
        self._rest_s = 0.0
        self._fired: list[Fired] = []
        self._asked: list[Asked] = []
        self._ended: list[Ended] = []
        self._held: list[Held] = []
        self._known: frozenset[str] = frozenset()
        self._num_audits = 0
        self._start_s = 0.0
        self._broken: tuple[str, ...] = ()
        self._under_way: set[int] = set()
        self._recent: list[tuple[float, int]] = []

    async def run(self) -> Record:
        """All of it.

        Raises:
            FuzzError: the cluster did not start.
            SystemFailedError: its leading process ended.
            NotRightError: it answers wrongly without anything else.
        """
        await self._await_whole()
        self.mix = Mix(
            Api(await self._schema()), CASES, seed=self._options.seed, kinds=self._options.kinds
        )
        for case in CASES:
            self._alone[case.name] = await learn(self._client, case, self._options.slo)
        self._aim()
        watching = asyncio.create_task(self._watch_processes())
        try:
            await self._send_all()
        finally:
            watching.cancel()
            self._gun.release()
        self._note_ended()
        await self._look_after()
        return self._record()

    async def _look_after(self) -> None:
        """Whether all is in order for a new replica, and for good requests beside it."""
        self._say("all has been sent; a decode replica is killed, and another one has to come")
        within_s = _PATIENCE_FOR_STARTS * self._start_s
        missing = await replace_one(
            self._leader,
            self._routers,
            num_replicas=self._options.num_replicas,
            within_s=within_s,
        )
        after = [f"{line}, {within_s:.0f} s after a death" for line in missing]
        for case in CASES:
            outcome = await self._client.ask(case)
            after += [f"{case.name}: {line}" for line in faults(outcome, self._alone[case.name])]
        self._broken = tuple(after)

    def _record(self) -> Record:
        return Record(
            seed=self._options.seed,
            alone=self._alone,
            fired=tuple(self._fired),
            asked=tuple(self._asked),
            ended=tuple(self._ended),
            held=tuple(self._held),
            num_audits=self._num_audits,
            broken=self._broken,
        )

    async def _await_whole(self) -> None:
        start_s = time.monotonic()
        while (waited_s := time.monotonic() - start_s) < _START_TIMEOUT_S:
            self._system.check_alive()
            seen = await self._routers.look()
            whole = seen is not None and seen.num_live == self._options.num_replicas
            if whole and self._routers.are_complete:
                self._start_s = waited_s
                return
            await asyncio.sleep(_POLL_S)
        raise FuzzError(f"not ready: {self._system.log_tail()}")

    async def _schema(self) -> dict[str, object]:
        async with httpx.AsyncClient(timeout=_START_TIMEOUT_S) as client:
            response = await client.get(f"{self._system.url.removesuffix('/v1')}/openapi.json")
        document: dict[str, object] = json.loads(response.text)
        return document

    def _aim(self) -> None:
        """Where shots go and how long anything may take, from how fast the cluster is."""
        slowest_s = max(max(each.took_s) for each in self._alone.values())
        self._rest_s = _REPORTS_S + _REST * slowest_s
        patience_s = max(_LEAST_PATIENCE_S, _PATIENCE * slowest_s)
        self._client = Client(self._system.url, timeout_s=patience_s)
        self._watch.renew()
        url = urlsplit(self._system.url)
        front = Listener(port=url.port or 80, address=url.hostname or "", process="the front door")
        others = tuple(each for each in self._watch.listeners() if each.port != front.port)
        self._gun = Gun(front, others, patience_s=patience_s)
        self._say(
            f"{len(self._alone)} good requests have their answers, the slowest after"
            f" {slowest_s:.2f} s; other ports: {', '.join(map(str, others))}"
        )

    # The mix.

    async def _send_all(self) -> None:
        if self._options.only:
            for number in self._options.only:
                await self._round([number])
            return
        deadline_s = time.monotonic() + self._options.seconds
        for first in itertools.count(0, ROUND):
            await self._round(range(first, first + ROUND), until_s=deadline_s)
            self._tell()
            if time.monotonic() >= deadline_s:
                return

    async def _round(self, numbers: Iterable[int], *, until_s: float | None = None) -> None:
        """Sends these, a few at once, and looks whether anything is held after it."""
        # Made before, as making a large one would hold up the clock of those under way.
        slots = iter([self.mix.slot(number) for number in numbers])
        sent: list[int] = []

        async def send_on() -> None:
            for slot in slots:  # All of the senders take from the one iterator.
                if until_s is not None and time.monotonic() >= until_s:
                    return
                sent.append(slot.number)
                await self._send(slot)

        async with asyncio.TaskGroup() as senders:
            for _ in range(self._options.num_at_once):
                senders.create_task(send_on())
        self._system.check_alive()
        self._gun.release()
        await self._audit(tuple(sent))

    async def _send(self, slot: Slot) -> None:
        self._under_way.add(slot.number)
        if isinstance(slot.what, Case):
            outcome = await self._client.ask(slot.what, cache_salt=f"fuzz {slot.number}")
            self._asked.append(Asked(number=slot.number, outcome=outcome))
        else:
            reply = await self._gun.fire(slot.what)
            target = str(self._gun.target(slot.what))
            fired = Fired(number=slot.number, shot=slot.what, target=target, reply=reply)
            self._fired.append(fired)
        self._under_way.discard(slot.number)
        self._recent.append((time.monotonic(), slot.number))

    async def _audit(self, sent: tuple[int, ...]) -> None:
        self._num_audits += 1
        held = await audit(self._routers, within_s=self._rest_s, known=self._known)
        if new := tuple(line for line in held if line not in self._known):
            self._held.append(Held(lines=new, suspects=sent))
            self._say(f"held: {'; '.join(new)}")
        self._known = frozenset(held)

    async def _watch_processes(self) -> None:
        while True:
            self._note_ended()
            await asyncio.sleep(_POLL_S)

    def _note_ended(self) -> None:
        now_s = time.monotonic()
        self._recent = [each for each in self._recent if each[0] > now_s - _SUSPECT_S]
        suspects = (*sorted(self._under_way), *(number for _, number in self._recent))
        ended = self._watch.ended()
        for process, pid in ended:
            self._ended.append(Ended(process=process, pid=pid, at_s=now_s, suspects=suspects))
            self._say(f"{process} (pid {pid}) has ended; suspects: {suspects}")
        self._watch.renew()

    def _tell(self) -> None:
        numbers = judge(self._record()).summary()
        self._say(", ".join(f"{name} {number:g}" for name, number in numbers.items()))
