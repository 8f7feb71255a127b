"""The planner between Serve's contexts and the plan."""

from types import SimpleNamespace
from typing import Any

from ray.serve._private.common import DeploymentID, ReplicaID

from cluster.config import parse_args
from cluster.planner import DEPLOYMENTS, FORGET_S, Planner, describe
from cluster.scaling import PoolPlan
from cluster.scaling_args import scaling_args, settings_from

EMPTY = {
    "prefill_backlog_s": 0.0, "num_decoding": 0.0, "kv_usage_fraction": 0.0,
    "num_kv_tokens": 1000.0, "decode_base_s": 0.01, "decode_per_request_s": 0.001,
    "decode_per_context_token_s": 0.0, "prefill_ready": 9.0, "decode_ready": 9.0,
    "prefill_draining": 0.0, "decode_draining": 0.0, "arrivals": 0.0,
}  # fmt: skip


class FakeMetrics:
    """Remembers what it is given."""

    def __init__(self) -> None:
        self.changes: list[tuple[str, int]] = []

    def observe(self, pool: str, plan: PoolPlan, *, is_change: bool) -> None:
        if is_change:
            self.changes.append((pool, plan.target))


class FakeServe:
    """Asks the planner about each deployment in turn, as Serve's controller does."""

    def __init__(self) -> None:
        args = {"prefill": {"max_replicas": 4}, "decode": {"max_replicas": 4}}
        config = parse_args(args)
        self.metrics = FakeMetrics()
        settings = settings_from(scaling_args(config))
        self.planner = Planner(settings, interval_s=2.0, metrics=self.metrics)  # type: ignore[arg-type]
        self.sizes = {"router": 1, "prefill": 1, "decode": 1}
        self.now_s = 1000.0
        self.counters = dict(EMPTY)
        self.points: dict[str, list[Any]] = {name: [] for name in EMPTY}

    def second(self, **counted: float) -> None:
        self.now_s += 1.0
        for name, value in counted.items():
            self.counters[name] = self.counters.get(name, 0.0) + value
            self.points.setdefault(name, [])
        for name, points in self.points.items():
            points.append(SimpleNamespace(timestamp=self.now_s, value=self.counters[name]))
        for name in DEPLOYMENTS:
            self.sizes[name] = self.planner.observe(self._context(name))

    def _context(self, name: str) -> Any:
        router = ReplicaID("r", DeploymentID("router", "app"))
        metrics = {key: {router: points} for key, points in self.points.items()}
        return SimpleNamespace(
            deployment_name=name,
            current_time=self.now_s,
            current_num_replicas=self.sizes[name],
            target_num_replicas=self.sizes[name],
            raw_metrics=metrics if name == "router" else {},
        )


def test_prompts_grow_prefill_and_nothing_else() -> None:
    serve = FakeServe()
    for _ in range(20):
        serve.second(
            arrivals=20,
            arrived_prefill_s=2.0,
            arrived_prefill_squared_s2=0.2,
            prompt_tokens=2000,
            ended=20,
            output_tokens=40,
        )
    assert serve.sizes["prefill"] >= 3
    assert (serve.sizes["decode"], serve.sizes["router"]) == (1, 1)
    assert serve.metrics.changes[0][0] == "prefill"


def test_an_application_that_was_deleted_is_forgotten() -> None:
    serve = FakeServe()
    for _ in range(10):
        serve.second(arrivals=20, arrived_prefill_s=2.0, arrived_prefill_squared_s2=0.2)
    assert serve.sizes["prefill"] > 1
    serve.sizes = dict.fromkeys(serve.sizes, 1)
    serve.now_s += FORGET_S + 1
    serve.second()
    assert serve.sizes["prefill"] == 1


def test_the_time_of_day_goes_forward_and_back() -> None:
    serve = FakeServe()
    for step_s in (3600.0, -3600.0):
        serve.second()
        serve.now_s += step_s
    for _ in range(20):
        serve.second(arrivals=20, arrived_prefill_s=2.0, arrived_prefill_squared_s2=0.2)
    assert serve.sizes["prefill"] > 1


def test_a_plan_in_one_line() -> None:
    plan = PoolPlan(
        target=2, needed=3, reason="prompts", held_by="gpu_budget", inputs=(("start_s", 20.0),)
    )
    assert describe("prefill", plan) == (
        "prefill: 2 replicas, 3 needed, held by gpu_budget: prompts (start_s 20)"
    )
