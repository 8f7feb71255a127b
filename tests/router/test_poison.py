"""One request that makes engines fail, among others: how many it takes with it, and who is refused.

Real core clients of one or several routers, over engines that are pretended: each computes a token
of all that it has in a step, hands it on some steps later, and fails where the poison is at its
place. Placements, numbers and the order of steps are drawn.
"""

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
from core_clusters import Cluster
from fake_replicas import HANDED_OVER, request
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

from engine.exit_cause import EngineExit
from engine.output_tokens import output_tokens
from engine.wire import AddRequest, Kind, LoadReport, Rejection, StepOutputs
from router.pool import Replica
from router.recovery import REFUSED_AFTER, RecoveryLimits

LIMITS = RecoveryLimits(max_moves=3, max_wait_s=120.0, stall_timeout_s=10.0)
HOWS = ("ends", "stalls")
POISON = "poison"
NUM_TOKENS = 40
MAX_LAG = 4


@dataclass
class Running:
    router: int
    request: EngineCoreRequest
    num_tokens: int
    is_suspect: bool

    @property
    def is_done(self) -> bool:
        """Its last token is computed, and may not have been handed on."""
        params = self.request.sampling_params
        assert params is not None
        return self.num_tokens >= (params.max_tokens or 0)


@dataclass(eq=False)
class Engine:
    """One engine, with the replica that each router knows it as."""

    name: str
    pool: str
    lag: int
    replicas: list[Replica] = field(default_factory=list)
    running: dict[str, Running] = field(default_factory=dict)
    rejections: list[tuple[int, Rejection]] = field(default_factory=list)
    under_way: deque[list[tuple[int, EngineCoreOutput]]] = field(default_factory=deque)

    def send(self, router: int, kind: Kind, message: Any) -> None:
        if kind is Kind.ADD:
            self._add(router, message)
        elif kind is Kind.ABORT:
            for request_id in message:
                self.running.pop(request_id, None)
        elif kind is Kind.CLEAR:
            for request_id in message:
                if request_id in self.running:
                    self.running[request_id].is_suspect = False

    def _add(self, router: int, add: AddRequest) -> None:
        request_id = add.request.request_id
        if add.is_suspect and self.suspect is not None:
            rejection = Rejection(request_id, "another suspect", has_suspect=True)
            self.rejections.append((router, rejection))
            return
        params = add.request.sampling_params
        num_tokens = len(output_tokens(params))
        self.running[request_id] = Running(router, add.request, num_tokens, add.is_suspect)

    @property
    def suspect(self) -> Running | None:
        return next((each for each in self.running.values() if each.is_suspect), None)

    def load_for(self, router: int) -> LoadReport:
        suspect = self.suspect
        return LoadReport(
            num_running=len(self.running),
            has_suspect=suspect is not None and suspect.router != router,
        )


class Wire:
    """A router's end of the connection to an engine."""

    closed_because = None

    async def drained(self) -> None:
        pass

    def __init__(self, engine: Engine, router: int) -> None:
        self._engine, self._router = engine, router

    def send(self, kind: Kind, message: Any) -> None:
        self._engine.send(self._router, kind, message)


class World:
    """Routers and engines. `place` is where the poison makes an engine fail: a number of output
    tokens in decode, or None while its prompt is computed, in whichever pool; `how` is what becomes
    of the engine."""

    def __init__(
        self,
        rng: random.Random,
        *,
        num_routers: int,
        num_engines: int,
        place: int | None,
        how: str = "ends",
    ) -> None:
        self.rng = rng
        self.how = how
        self.place = place
        self.num_failures = 0
        self.num_made = 0
        self.now_s = 0.0
        self.routers = [
            Cluster(num=0, limits=LIMITS, clock=lambda: self.now_s) for _ in range(num_routers)
        ]
        self.engines: list[Engine] = []
        self.ended: dict[str, EngineCoreOutput] = {}
        for pool in ("prefill", "decode"):
            for _ in range(num_engines):
                self.start(pool)

    def start(self, pool: str) -> None:
        self.num_made += 1
        engine = Engine(f"{pool}{self.num_made}", pool, self.rng.randint(0, MAX_LAG))
        self.engines.append(engine)
        for index, router in enumerate(self.routers):
            core = router.core
            pools = {"prefill": core.prefill, "decode": core.decode}
            replica = Replica(engine.name, pools[pool], on_gone=lambda _: None)
            replica.end = Wire(engine, index)  # type: ignore[assignment]
            engine.replicas.append(replica)
        for replica in engine.replicas:
            replica.pool.insert(replica)

    def step(self, engine: Engine) -> None:
        rejections, engine.rejections = engine.rejections, []
        for router, rejection in rejections:
            replica = engine.replicas[router]
            replica.step_received(StepOutputs([], engine.load_for(router)))
            replica.rejected(rejection)
        outputs: list[tuple[int, EngineCoreOutput]] = []
        for request_id, running in engine.running.items():
            if running.is_done:
                continue
            if self.is_deadly(engine, running):
                self.fail(engine)
                return
            running.num_tokens += 1
            params = running.request.sampling_params
            assert params is not None
            hands_over = "kv_transfer_params" in (params.extra_args or {})
            output = EngineCoreOutput(
                request_id,
                [running.num_tokens],
                finish_reason=FinishReason.LENGTH if running.is_done else None,
                kv_transfer_params=dict(HANDED_OVER)
                if engine.pool == "prefill" and hands_over
                else None,
            )
            outputs.append((running.router, output))
        engine.under_way.append(outputs)
        if len(engine.under_way) > engine.lag or not outputs:
            self.deliver(engine)

    def is_deadly(self, engine: Engine, running: Running) -> bool:
        if not running.request.request_id.startswith(POISON):
            return False
        if self.place is not None:
            return engine.pool == "decode" and running.num_tokens == self.place
        computes_prompt = running.num_tokens == len(output_tokens(running.request.sampling_params))
        pulls = engine.pool == "decode" and "remote_block_ids" in str(
            running.request.sampling_params
        )
        return computes_prompt and not pulls

    def deliver(self, engine: Engine) -> None:
        outputs = engine.under_way.popleft()
        for _, output in outputs:
            if output.finished:
                engine.running.pop(output.request_id, None)
        for index, replica in enumerate(engine.replicas):
            mine = [output for router, output in outputs if router == index]
            replica.step_received(StepOutputs(mine, engine.load_for(index)))
        self.collect()

    def collect(self) -> None:
        for router in self.routers:
            for output in router.outputs():
                if output.finished:
                    assert output.request_id not in self.ended, "ended twice"
                    self.ended[output.request_id] = output

    def fail(self, engine: Engine) -> None:
        """The engine ends with all that it has not handed on, and another one is started."""
        self.num_failures += 1
        # It takes so long to see that it hangs.
        self.now_s += LIMITS.stall_timeout_s
        self.engines.remove(engine)
        how = EngineExit(cause="SIGSEGV", text="ended by SIGSEGV", num_requests=len(engine.running))
        engine.running.clear()
        for replica in self.rng.sample(engine.replicas, len(engine.replicas)):
            if self.how == "ends":
                replica.engine_ended(how)
            else:
                replica.step_received(StepOutputs([], LoadReport(leaves_because="stalled")))
            replica.replica_gone(self.how)
        self.start(engine.pool)
        self.collect()

    async def run(self, names: list[str]) -> None:
        """Adds the requests, in the midst of steps, and steps until all have ended."""
        to_add = deque(self.rng.sample(names, len(names)))
        for _ in range(20_000):
            if len(self.ended) == len(names):
                return
            if to_add and self.rng.random() < 0.5:
                router = self.rng.choice(self.routers)
                await router.core.add_request_async(
                    request(to_add.popleft(), max_tokens=NUM_TOKENS)
                )
            self.step(self.rng.choice(self.engines))
        raise AssertionError(f"not ended: {set(names) - self.ended.keys()}")


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("num_routers", [1, 2, 3])
@pytest.mark.parametrize("seed", range(40))
async def test_poison_ends_three_engines_at_most_and_no_innocent_request(
    seed: int, num_routers: int, how: str
) -> None:
    rng = random.Random(seed)
    place = rng.choice([None, 1, 2, 5, 20, NUM_TOKENS - 1])
    world = World(rng, num_routers=num_routers, num_engines=rng.randint(1, 4), place=place, how=how)
    innocents = [f"r{index}" for index in range(rng.choice([0, 1, 1, 2, 6, 12]))]
    await world.run([*innocents, POISON])
    assert world.num_failures <= REFUSED_AFTER
    reasons = {name: world.ended[name].finish_reason for name in innocents}
    assert set(reasons.values()) <= {FinishReason.LENGTH}, reasons
    # Where prefill computes the very token that decode fails at, it gets past that place.
    is_refused = world.ended[POISON].finish_reason == FinishReason.ERROR
    assert is_refused is (world.num_failures == REFUSED_AFTER)
    for router in world.routers:
        router.check_settled()
