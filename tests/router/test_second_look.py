"""A prompt moves on where its replica says that more is ahead of it than was known."""

from typing import Any

import pytest
from fake_replicas import end_of, join, prefilled, request, step
from prometheus_client import CollectorRegistry

from engine.wire import AddRequest, Kind, LoadReport, Taken
from router.core_client import ClusterCoreClient
from router.metrics import RouterMetrics
from router.policies import POLICIES
from router.pool import Replica
from router.recovery import RecoveryLimits
from router.second_look import MOST_LOOKS, looks_again, moves_on
from router.traffic import TrafficMeter

MUCH_S = 50.0
BLOCK = 128


class Cluster:
    """One of several routers, over three fake prefill replicas and one of decode."""

    def __init__(self, *, num_routers: int = 3, policy: str = "p2c") -> None:
        self.registry = CollectorRegistry()
        traffic = TrafficMeter(ttft_s=1.0, itl_s=1.0)
        self.core = ClusterCoreClient(
            POLICIES[policy],
            RouterMetrics(self.registry, traffic),
            RecoveryLimits(max_moves=3, max_wait_s=120.0, stall_timeout_s=10.0),
            traffic=traffic,
            num_routers=num_routers,
        )
        self.prefill = [
            join(self.core.prefill, f"p{index}", block_size=BLOCK) for index in range(3)
        ]
        self.decode = join(self.core.decode, "d0", block_size=BLOCK)

    async def send(self, request_id: str = "r", **options: Any) -> None:
        made = request(request_id, **options)
        made.prompt_token_ids = [*range(4 * BLOCK)]
        await self.core.add_request_async(made)

    def has(self) -> Replica:
        """The replica that was sent something last and was not told to forget it."""
        (found,) = (
            each
            for each in self.prefill
            if [r.request_id for r in end_of(each).added()] != end_of(each).told(Kind.ABORT)
        )
        return found

    def answer(self, others_work_s: float) -> None:
        """The replica that has the prompt says what others have sent there."""
        replica = self.has()
        newest = end_of(replica).added()[-1].request_id
        replica.taken(Taken(newest, LoadReport(others_work_s=others_work_s)))

    @property
    def num_called_back(self) -> float | None:
        found: float | None = self.registry.get_sample_value("pdserve_called_back_total")
        return found


def asks(replica: Replica) -> list[bool]:
    return [m.asks_load for _, m in end_of(replica).sent if isinstance(m, AddRequest)]


@pytest.mark.parametrize(
    ("here_s", "there_s", "moves"),
    [
        pytest.param(2.0, 1.0, True, id="much-sooner-there"),
        pytest.param(1.2, 1.0, False, id="hardly-sooner-there"),
        pytest.param(1.0, 1.0, False, id="the-same"),
        pytest.param(1.0, 5.0, False, id="later-there"),
    ],
)
def test_it_moves_where_that_is_worth_a_part_of_its_own_work(
    here_s: float, there_s: float, moves: bool
) -> None:
    assert moves_on(here_s=here_s, there_s=there_s, request_s=1.0) is moves


@pytest.mark.parametrize(
    ("policy", "num_routers", "looks"),
    [
        ("p2c", 2, True),
        ("least_work", 2, True),
        ("p2c", 1, False),
        ("round_robin", 2, False),
        ("random", 2, False),
    ],
)
async def test_who_asks_what_a_replica_has(policy: str, num_routers: int, looks: bool) -> None:
    assert looks_again(POLICIES[policy], num_routers=num_routers) is looks
    cluster = Cluster(num_routers=num_routers, policy=policy)
    await cluster.send()
    assert asks(cluster.has()) == [looks]


async def test_a_prompt_leaves_a_replica_that_has_more_than_was_known() -> None:
    cluster = Cluster()
    await cluster.send()
    first = cluster.has()
    cluster.answer(MUCH_S)
    second = cluster.has()
    assert second is not first
    assert end_of(first).told(Kind.ABORT) == ["r"]
    assert [each.request_id for each in end_of(second).added()] == ["r~2"]
    assert cluster.num_called_back == 1
    # Its tokens are those of the second; what the first one says of it is nobody's.
    step(first, prefilled(5, request_id="r"))
    step(second, prefilled(6, request_id="r~2"))
    outputs = await cluster.core.get_output_async()
    assert [(each.request_id, each.new_token_ids) for each in outputs.outputs] == [("r", [6])]
    assert end_of(first).told(Kind.RELEASE) == ["r"]
    assert [each.request_id for each in end_of(cluster.decode).added()] == ["r~2"]
    # It arrived once.
    assert cluster.core.scaling_report()["arrivals"] == 1


async def test_it_looks_only_so_often() -> None:
    cluster = Cluster()
    await cluster.send()
    for _ in range(MOST_LOOKS):
        cluster.answer(MUCH_S)
    assert cluster.num_called_back == MOST_LOOKS
    assert asks(cluster.has()) == [False]


async def test_it_stays_where_no_more_is_ahead_of_it_than_was_known() -> None:
    cluster = Cluster()
    await cluster.send()
    first = cluster.has()
    cluster.answer(0.0)
    assert cluster.has() is first
    assert cluster.num_called_back == 0


async def test_an_answer_that_comes_too_late_changes_nothing() -> None:
    cluster = Cluster()
    await cluster.send()
    first = cluster.has()
    step(first, prefilled())
    first.taken(Taken("r", LoadReport(others_work_s=MUCH_S)))
    assert end_of(first).told(Kind.ABORT) == []
    assert cluster.num_called_back == 0


async def test_only_the_replica_that_reads_a_prompt_is_thought_to_have_it_cached() -> None:
    cluster = Cluster()
    await cluster.send()
    cluster.answer(MUCH_S)
    cluster.answer(0.0)
    reader = cluster.has()
    state = next(iter(cluster.core._requests.values()))
    chain = state.blocks(cluster.core.prefill.block_size)
    assert cluster.core.prefill.num_cached(chain, 4 * BLOCK).keys() == {reader.replica_id}


async def test_it_stays_where_every_other_replica_leaves() -> None:
    cluster = Cluster()
    await cluster.send()
    for replica in cluster.prefill:
        replica.set_listed(False)
    cluster.answer(MUCH_S)
    assert cluster.num_called_back == 0
