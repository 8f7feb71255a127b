"""Tests of the scaling plan: a pure function, so tables and made-up traffic."""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest

from cluster.scaling import (
    Attainment,
    Engines,
    LearnedState,
    Load,
    PoolCounts,
    PoolLimits,
    ScalePlan,
    ScaleSettings,
    ScaleSnapshot,
    ScaleState,
    Targets,
    Traffic,
    plan_scale,
)
from router.costs import DecodeCost
from router.slo import Slo

PREFILL_S = 0.1
ENGINES = Engines(
    decode=DecodeCost(base_s=0.01, per_request_s=0.0005, per_context_token_s=0.0),
    num_kv_tokens=10**6,
    max_batch=256,
)
"""40 ms allow a batch of 60."""
POOL = PoolLimits(min_replicas=1, max_replicas=20)
SETTINGS = ScaleSettings(
    targets=Targets(slo=Slo(ttft_s=0.5, itl_s=0.04), share=0.9),
    prefill=POOL,
    decode=POOL,
    down_delay_s=30.0,
    look_back_s=120.0,
    idle_s=60.0,
    expected_start_s=20.0,
)
TICK_S = 2.0


def second(
    arrivals: float,
    *,
    prompt_tokens: int = 1000,
    output_tokens: int = 100,
    prefill_s: float = PREFILL_S,
    met: float = 1.0,
) -> Traffic:
    """One second of traffic in which as many end as arrive."""
    num = round(arrivals)
    attained = Attainment(num=num, num_met=round(met * num))
    return Traffic(
        duration_s=1.0,
        num_arrivals=num,
        prefill_s=num * prefill_s,
        prefill_squared_s2=num * prefill_s**2,
        num_prompt_tokens=num * prompt_tokens,
        num_ended=num,
        num_output_tokens=num * output_tokens,
        ttft=attained,
        itl=attained,
    )


@dataclass
class Cluster:
    """Follows every plan: starts take `start_s`, ends take no time."""

    settings: ScaleSettings = SETTINGS
    start_s: float = 20.0
    now_s: float = 0.0

    def __post_init__(self) -> None:
        self.state = ScaleState()
        self.ready = {"prefill": 1, "decode": 1}
        self.starting: dict[str, list[float]] = {"prefill": [], "decode": []}
        self.sizes: list[tuple[int, int]] = []
        self.plan: ScalePlan | None = None

    def counts(self, pool: str) -> PoolCounts:
        return PoolCounts(num_ready=self.ready[pool], num_starting=len(self.starting[pool]))

    def tick(self, *traffic: Traffic, load: Load | None = None, reported: bool = True) -> ScalePlan:
        self.now_s += TICK_S
        for pool, starts in self.starting.items():
            done = [since for since in starts if self.now_s - since >= self.start_s]
            self.ready[pool] += len(done)
            self.starting[pool] = starts[len(done) :]
        snapshot = ScaleSnapshot(
            now_s=self.now_s,
            traffic=traffic if reported else None,
            load=load or Load(),
            prefill=self.counts("prefill"),
            decode=self.counts("decode"),
            engines=ENGINES,
        )
        plan = plan_scale(snapshot, self.settings, self.state)
        self.state = plan.state
        for pool, target in (("prefill", plan.prefill.target), ("decode", plan.decode.target)):
            more = target - self.ready[pool] - len(self.starting[pool])
            self.starting[pool] += [self.now_s] * max(0, more)
            called_off = min(len(self.starting[pool]), max(0, -more))
            self.starting[pool] = self.starting[pool][: len(self.starting[pool]) - called_off]
            self.ready[pool] -= max(0, -more - called_off)
        self.sizes.append((plan.prefill.target, plan.decode.target))
        self.plan = plan
        return plan

    def run(self, seconds: float, traffic: Callable[[], Traffic]) -> ScalePlan:
        for _ in range(int(seconds / TICK_S)):
            plan = self.tick(*(traffic() for _ in range(int(TICK_S))))
        return plan

    @property
    def num_changes(self) -> int:
        return sum(before != after for before, after in itertools.pairwise(self.sizes))


def poisson(rate: float, rng: random.Random) -> Iterator[int]:
    """Arrivals of each second."""
    while True:
        num, at_s = 0, rng.expovariate(rate)
        while at_s < 1.0:
            num, at_s = num + 1, at_s + rng.expovariate(rate)
        yield num


@pytest.mark.parametrize(
    ("num_decoding", "grows"),
    [
        pytest.param(lambda elapsed_s: 5 * elapsed_s, True, id="full for a while"),
        pytest.param(lambda elapsed_s: 5 * min(elapsed_s, 11), False, id="not quite full"),
    ],
)
def test_decode_that_is_full_grows_before_the_longer_answers_end(
    num_decoding: Callable[[float], float], grows: bool
) -> None:
    """What has ended was short; a replica takes 60 requests."""
    cluster = Cluster()
    cluster.run(200, lambda: second(5, output_tokens=10))
    assert cluster.ready["decode"] == 1
    for elapsed_s in range(0, 60, 2):
        began = replace(second(5), num_ended=0, num_output_tokens=0, itl=Attainment())
        cluster.tick(began, began, load=Load(num_decoding=round(num_decoding(elapsed_s))))
    assert cluster.plan is not None
    assert (cluster.plan.decode.target > 1) is grows


@pytest.mark.parametrize(("rate", "share"), [(3, 0.9), (12, 0.99), (45, 0.9)])
def test_constant_load_does_not_flap(rate: float, share: float) -> None:
    arrivals = poisson(rate, random.Random(f"{rate} {share}"))
    settings = replace(SETTINGS, targets=replace(SETTINGS.targets, share=share), look_back_s=300.0)
    cluster = Cluster(settings)
    cluster.run(300, lambda: second(next(arrivals)))
    settled = len(cluster.sizes)
    plan = cluster.run(900, lambda: second(next(arrivals)))
    later = cluster.sizes[settled:]
    assert sum(a != b for a, b in itertools.pairwise(later)) <= 2
    assert plan.prefill.target > rate * PREFILL_S


def test_a_step_of_prompts_grows_prefill_within_seconds_and_not_decode() -> None:
    cluster = Cluster()
    cluster.run(120, lambda: second(4, output_tokens=10))
    assert cluster.sizes[-1] == (1, 1)
    plan = cluster.run(6, lambda: second(40, output_tokens=10))
    assert plan.prefill.target >= 5
    assert plan.decode.target == 1
    assert "prompts" in plan.prefill.reason


def test_a_step_of_answers_grows_decode_and_not_prefill() -> None:
    cluster = Cluster()
    cluster.run(120, lambda: second(4, prefill_s=0.01))
    plan = cluster.run(20, lambda: second(12, prefill_s=0.01, output_tokens=1000))
    assert plan.decode.target >= 3
    assert plan.prefill.target == 1
    assert "answers" in plan.decode.reason


def test_keeps_what_came_unforeseen_for_the_look_back() -> None:
    cluster = Cluster()
    cluster.run(200, lambda: second(4))
    cluster.run(16, lambda: second(40))
    cluster.run(60, lambda: second(4))
    large = cluster.sizes[-1][0]
    assert large >= 4, "a burst shorter than a start would come unforeseen again"
    cluster.run(120, lambda: second(4))
    assert cluster.sizes[-1][0] == 1


def test_lets_go_of_what_was_foreseen_and_is_over() -> None:
    cluster = Cluster()
    cluster.run(200, lambda: second(40))
    assert cluster.sizes[-1][0] >= 5
    cluster.run(80, lambda: second(4))
    assert cluster.sizes[-1][0] < 5


def test_grows_before_a_burst_comes_back_and_lets_go_of_it_after() -> None:
    cluster = Cluster()
    for _ in range(4):
        cluster.run(84, lambda: second(4))
        cluster.run(16, lambda: second(40))
    plan = cluster.run(84, lambda: second(4))
    sizes = [prefill for prefill, _ in cluster.sizes[-int(84 / TICK_S) :]]
    in_time = int((84 - 20) / TICK_S)
    assert sizes[1] == 1, "a predicted fall waits for no down_delay_s"
    assert set(sizes[1 : in_time - 5]) == {1}
    assert set(sizes[in_time - 1 :]) == {5}, "a start before the burst"
    assert dict(plan.prefill.inputs)["season_s"] == pytest.approx(100.0, abs=2.0)
    assert plan.state.prefill.down_factor == plan.state.decode.down_factor == 1.0


def test_remembers_a_second_look_back_for_what_comes_back() -> None:
    cluster = Cluster()
    nums = itertools.count()
    cluster.run(400, lambda: second(next(nums)))
    come = [each.num_arrivals for each in (*cluster.state.older, *cluster.state.history)]
    assert come == list(range(160, 400))
    assert len(cluster.state.history) == 120


def test_keeps_what_the_past_needed_once_more_comes_than_a_season_said() -> None:
    cluster = Cluster()
    for _ in range(4):
        cluster.run(84, lambda: second(4))
        cluster.run(16, lambda: second(40))
    cluster.run(40, lambda: second(4))
    assert cluster.sizes[-1][0] == 1
    plan = cluster.run(10, lambda: second(20))
    assert plan.prefill.target >= 4
    assert plan.prefill.reason == "prompts of the look-back"
    assert "season_s" not in dict(plan.prefill.inputs)


def test_waits_down_delay_after_a_change() -> None:
    state = ScaleState(
        history=(second(4),) * 120,
        last_arrival_s=1000.0,
        prefill=LearnedState(target=5, num_ready=5, changed_s=995.0),
        decode=LearnedState(target=1, num_ready=1),
    )
    snapshot = ScaleSnapshot(
        now_s=1000.0,
        traffic=(second(4), second(4)),
        load=Load(),
        prefill=PoolCounts(num_ready=5),
        decode=PoolCounts(num_ready=1),
        engines=ENGINES,
    )
    first = plan_scale(snapshot, SETTINGS, state)
    assert (first.prefill.target, first.prefill.held_by) == (5, "down_delay_s")
    later = plan_scale(replace(snapshot, now_s=1046.0), SETTINGS, first.state)
    assert (later.prefill.target, later.prefill.held_by) == (1, None)


def test_without_reports_nothing_shrinks() -> None:
    cluster = Cluster()
    cluster.run(200, lambda: second(40))
    size = cluster.sizes[-1]
    for _ in range(500):
        plan = cluster.tick(reported=False)
    assert (plan.prefill.target, plan.decode.target) == size
    assert plan.prefill.held_by == "no router has reported"


def test_starting_replicas_count_and_their_time_is_measured() -> None:
    cluster = Cluster(replace(SETTINGS, expected_start_s=35.0), start_s=40.0)
    cluster.run(60, lambda: second(4))
    cluster.run(20, lambda: second(40))
    wanted = cluster.sizes[-1][0]
    assert len(cluster.starting["prefill"]) == wanted - 1
    cluster.run(22, lambda: second(40))
    assert cluster.sizes[-1][0] == wanted, "those that start were asked for again"
    cluster.run(20, lambda: second(40))
    assert cluster.state.prefill.start_s == pytest.approx(40.0, abs=TICK_S)


def test_backlog_that_ready_replicas_clear_in_time_starts_none() -> None:
    cluster = Cluster()
    cluster.run(60, lambda: second(4))
    plan = cluster.tick(second(4), second(4), load=Load(prefill_backlog_s=5.0))
    assert plan.prefill.target == 1
    plan = cluster.tick(second(4), second(4), load=Load(prefill_backlog_s=60.0))
    assert plan.prefill.target > 1
    assert plan.prefill.reason == "prompts that wait longer than a start takes"


def test_kv_cache_bounds_the_batch() -> None:
    cluster = Cluster()
    roomy = cluster.run(120, lambda: second(10, prompt_tokens=1000, prefill_s=0.01))
    assert roomy.decode.target == 1
    long = Cluster()
    plan = long.run(120, lambda: second(10, prompt_tokens=200_000, prefill_s=0.01))
    assert plan.decode.target >= 4
    assert "the KV cache" in plan.decode.reason


@pytest.mark.parametrize(
    ("budget", "sizes"),
    [(None, (6, 3)), (9, (6, 3)), (6, (4, 2)), (3, (2, 1)), (2, (1, 1))],
    ids=["none", "enough", "two-thirds", "a-third", "minimums"],
)
def test_budget_keeps_the_ratio(budget: int | None, sizes: tuple[int, int]) -> None:
    state = ScaleState(
        last_arrival_s=0.0,
        prefill=LearnedState(target=6, num_ready=6),
        decode=LearnedState(target=3, num_ready=3),
    )
    # 4.4 busy prefill replicas, and 140 answers at once of which 60 share a step.
    traffic = (second(44, output_tokens=80),) * 120
    snapshot = ScaleSnapshot(
        now_s=0.0,
        traffic=traffic,
        load=Load(),
        prefill=PoolCounts(num_ready=6),
        decode=PoolCounts(num_ready=3),
        engines=ENGINES,
    )
    plan = plan_scale(snapshot, replace(SETTINGS, gpu_budget=budget), state)
    assert (plan.prefill.target, plan.decode.target) == sizes
    held = {plan.prefill.held_by, plan.decode.held_by}
    assert ("gpu_budget" in held) == (sizes != (6, 3))


def test_draining_replicas_hold_their_gpus_but_end_nobody() -> None:
    cluster = Cluster(replace(SETTINGS, gpu_budget=8))
    cluster.run(200, lambda: second(30))
    size = cluster.sizes[-1]
    snapshot = ScaleSnapshot(
        now_s=cluster.now_s + 2,
        traffic=(second(60), second(60)),
        load=Load(),
        prefill=PoolCounts(num_ready=size[0], num_draining=8 - sum(size)),
        decode=PoolCounts(num_ready=size[1]),
        engines=ENGINES,
    )
    plan = plan_scale(snapshot, cluster.settings, cluster.state)
    assert (plan.prefill.target, plan.decode.target) == size


def test_to_zero_and_back_for_a_held_request() -> None:
    zero = replace(POOL, min_replicas=0)
    cluster = Cluster(replace(SETTINGS, prefill=zero, decode=zero))
    cluster.run(60, lambda: second(4))
    plan = cluster.run(50, lambda: second(0))
    assert (plan.prefill.target, plan.decode.target) == (1, 1)
    plan = cluster.run(60, lambda: second(0))
    assert (plan.prefill.target, plan.decode.target) == (0, 0)
    assert plan.decode.reason == "no requests"
    plan = cluster.tick(second(0), second(0), load=Load(num_decoding=1))
    assert (plan.prefill.target, plan.decode.target) == (1, 1)


def test_warm_replicas_come_on_top() -> None:
    cluster = Cluster(replace(SETTINGS, prefill=replace(POOL, warm_replicas=2)))
    plan = cluster.run(60, lambda: second(4))
    assert (plan.prefill.needed, plan.prefill.target) == (1, 3)


def test_a_fixed_pool_keeps_its_size() -> None:
    fixed = PoolLimits(min_replicas=3, max_replicas=3)
    cluster = Cluster(replace(SETTINGS, decode=fixed))
    cluster.ready["decode"] = 3
    cluster.run(60, lambda: second(60))
    assert {size for _, size in cluster.sizes} == {3}


def test_up_delay_holds_a_pool_that_serves() -> None:
    cluster = Cluster(replace(SETTINGS, up_delay_s=10.0))
    cluster.run(60, lambda: second(4))
    plan = cluster.run(8, lambda: second(40))
    assert (plan.prefill.target, plan.prefill.held_by) == (1, "up_delay_s")
    plan = cluster.run(8, lambda: second(40))
    assert plan.prefill.target > 1


def test_misses_that_were_not_predicted_correct_the_prediction() -> None:
    cluster = Cluster()
    cluster.run(300, lambda: second(4))
    assert cluster.sizes[-1][0] == 1
    cluster.run(900, lambda: second(4, met=0.5))
    assert cluster.state.prefill.correction > 1.0
    assert cluster.sizes[-1][0] > 1
    grown = cluster.state.prefill.correction
    cluster.run(1800, lambda: second(4))
    assert cluster.state.prefill.correction < grown


def test_misses_of_an_ample_pool_correct_nothing() -> None:
    ample = PoolLimits(min_replicas=10, max_replicas=20)
    cluster = Cluster(replace(SETTINGS, prefill=ample))
    cluster.ready["prefill"] = 10
    cluster.run(900, lambda: second(4, met=0.5))
    assert cluster.state.prefill.correction == 1.0
    assert cluster.sizes[-1][0] == 10


def test_a_pool_that_misses_its_target_does_not_shrink() -> None:
    cluster = Cluster()
    cluster.run(200, lambda: second(40))
    size = cluster.sizes[-1][0]
    cluster.run(30, lambda: second(40, met=0.5))
    plan = cluster.run(180, lambda: second(4, met=0.5))
    assert plan.prefill.target >= size
    assert plan.prefill.held_by == "the target is missed as it is"
    cluster.run(600, lambda: second(4))
    assert cluster.sizes[-1][0] < size


def test_misses_of_an_overload_that_is_over_do_not_keep_a_pool() -> None:
    cluster = Cluster()
    cluster.run(60, lambda: second(4))
    for _ in range(15):
        late = second(40, met=0.2)
        cluster.tick(late, late, load=Load(prefill_backlog_s=50.0))
    plan = cluster.tick(second(40), second(40), load=Load(prefill_backlog_s=50.0))
    assert plan.prefill.target > 1
    plan = cluster.run(20, lambda: second(4))
    assert plan.prefill.held_by == "down_delay_s"


@pytest.mark.parametrize(("rate", "shrinks"), [(4, True), (60, False)])
def test_regret_does_not_keep_a_pool_of_which_most_is_idle(rate: int, shrinks: bool) -> None:
    regretful = LearnedState(target=10, num_ready=10, changed_s=0.0, shrunk_s=0.0, down_factor=8.0)
    cluster = Cluster()
    cluster.ready["prefill"] = 10
    cluster.state = ScaleState(prefill=regretful)
    plan = cluster.run(60, lambda: second(rate))
    assert plan.prefill.needed < 10
    assert (plan.prefill.target < 10) is shrinks


def test_prompts_too_long_for_the_target_do_not_ask_for_more() -> None:
    cluster = Cluster()
    plan = cluster.run(120, lambda: second(1, prefill_s=0.9, met=0.0))
    assert plan.prefill.target <= 3
    assert cluster.state.prefill.correction == 1.0


def test_a_rising_load_is_met_before_it_arrives() -> None:
    cluster = Cluster()
    rates = itertools.count(20, 1)
    seconds = (rate / 2 for rate in rates)
    plan = cluster.run(120, lambda: second(next(seconds)))
    arriving = 140 / 2 * PREFILL_S
    assert plan.prefill.target >= arriving + 20 * 0.5 * PREFILL_S


def test_the_same_snapshot_gives_the_same_plan() -> None:
    cluster = Cluster()
    cluster.run(60, lambda: second(10))
    snapshot = ScaleSnapshot(
        now_s=cluster.now_s,
        traffic=(second(10),),
        load=Load(),
        prefill=PoolCounts(num_ready=1),
        decode=PoolCounts(num_ready=1),
        engines=ENGINES,
    )
    first, second_ = (plan_scale(snapshot, SETTINGS, cluster.state) for _ in range(2))
    assert first == second_


def decode_target(backlog_s: float, *, max_prefill: int = 20) -> int:
    """Where so much waits for prefill."""
    cluster = Cluster(settings=replace(SETTINGS, prefill=replace(POOL, max_replicas=max_prefill)))
    cluster.run(60, lambda: second(60))
    waiting = Load(prefill_backlog_s=backlog_s)
    return cluster.tick(second(60), second(60), load=waiting).decode.target


def test_decode_is_ready_for_what_prefill_will_hand_over() -> None:
    """Prompts that wait for prefill are read as fast as its new replicas can."""
    assert decode_target(400.0) > decode_target(0.0)


def test_decode_is_not_made_ready_for_prefill_replicas_that_there_cannot_be() -> None:
    assert decode_target(4000.0, max_prefill=8) < decode_target(4000.0)


def test_prompts_that_were_put_back_do_not_correct_the_prediction() -> None:
    """What came in an overload gets its first tokens minutes after it, late."""
    cluster = Cluster()
    behind = Load(prefill_backlog_s=100.0)
    for _ in range(10):
        cluster.tick(second(30.0, met=0.0), second(30.0, met=0.0), load=behind)
    echo = cluster.run(120.0, lambda: second(30.0, met=0.5))
    assert echo.state.prefill.correction == 1.0
    later = cluster.run(240.0, lambda: second(30.0, met=0.5))
    assert later.state.prefill.correction > 1.0
