"""Unsynchronised routers with old reports, simulated with the production ledger and policy.

The lengths have the mean and spread of Mooncake's trace of conversations; reading one takes 1.5 s
on average, so that a report that is 5 s old is three prompts old. Prompts stay where they are sent
first: what a second look adds, `python -m benchmarks.simulate routers` tells.
"""

import heapq
import random
from dataclasses import dataclass, field

import pytest

from router.costs import PrefillCost
from router.ledger import Ledger
from router.policies import POLICIES

NUM_REPLICAS = 16
NUM_REQUESTS = 12_000
LOAD = 0.85
REPORT_EVERY_S = 5.0
LOG_LENGTH = (8.74, 1.2)
"""Mean and deviation."""
MAX_LENGTH = 124_000
COST = PrefillCost(base_s=0.02, per_token_s=7e-5, per_token_squared_s=1.6e-9)


@dataclass
class Replica:
    """First come, first served."""

    free_s: float = 0.0
    queue: list[tuple[int, float]] = field(default_factory=list)
    """Router and work of what has not ended, in order."""

    def others_work_s(self, router: int) -> float:
        return sum(work_s for sender, work_s in self.queue if sender != router)

    def progress_s(self, now_s: float) -> float:
        if not self.queue:
            return 0.0
        ahead_s = sum(work_s for _, work_s in self.queue[1:])
        return self.queue[0][1] - (self.free_s - ahead_s - now_s)


def arrivals(seed: int) -> list[tuple[float, float]]:
    """When each request comes and how much work it is."""
    rng = random.Random(seed)
    lengths = [min(MAX_LENGTH, int(rng.lognormvariate(*LOG_LENGTH))) for _ in range(NUM_REQUESTS)]
    works = [COST.seconds(num_uncached=length, num_tokens=length) for length in lengths]
    rate = LOAD * NUM_REPLICAS * NUM_REQUESTS / sum(works)
    now_s, found = 0.0, []
    for work_s in works:
        now_s += rng.expovariate(rate)
        found.append((now_s, work_s))
    return found


def mean_ttft_omniscient(seed: int) -> float:
    free = [0.0] * NUM_REPLICAS
    total_s = 0.0
    for now_s, work_s in arrivals(seed):
        place = min(range(NUM_REPLICAS), key=lambda index: max(free[index], now_s))
        free[place] = max(free[place], now_s) + work_s
        total_s += free[place] - now_s
    return total_s / NUM_REQUESTS


def mean_ttft(num_routers: int, seed: int) -> float:
    """With routers that each see every replica's report every 5 s, and at the end of a request."""
    rng = random.Random(1)
    replicas = [Replica() for _ in range(NUM_REPLICAS)]
    ledgers = [Ledger(num_routers=num_routers) for _ in range(num_routers)]
    events: list[tuple[float, int, int, int, str]] = []
    for router, ledger in enumerate(ledgers):
        for index in range(NUM_REPLICAS):
            ledger.insert(str(index), 0.0)
            heapq.heappush(events, (rng.random() * REPORT_EVERY_S, -1, router, index, ""))

    def report(router: int, index: int, now_s: float) -> None:
        replica = replicas[index]
        ledgers[router].report(
            str(index),
            others_work_s=replica.others_work_s(router),
            progress_s=replica.progress_s(now_s),
            now_s=now_s,
        )

    total_s = 0.0
    for number, (now_s, work_s) in enumerate(arrivals(seed)):
        while events[0][0] <= now_s:
            at_s, _, router, index, ended = heapq.heappop(events)
            if ended:
                replicas[index].queue.pop(0)
                ledgers[router].complete(str(index), ended)
            else:
                heapq.heappush(events, (at_s + REPORT_EVERY_S, -1, router, index, ""))
            report(router, index, at_s)
        router = rng.randrange(num_routers)
        plan = POLICIES["p2c"](ledgers[router].snapshot(now_s, request_s=work_s), rng)
        index = int(plan.replica_id)
        replica = replicas[index]
        replica.free_s = max(replica.free_s, now_s) + work_s
        replica.queue.append((router, work_s))
        ledgers[router].add(plan.replica_id, str(number), work_s, now_s=now_s)
        heapq.heappush(events, (replica.free_s, number, router, index, str(number)))
        total_s += replica.free_s - now_s
    return total_s / NUM_REQUESTS


@pytest.mark.parametrize(("num_routers", "at_most"), [(1, 1.05), (4, 1.5), (16, 1.5)])
def test_mean_ttft_is_near_that_of_a_router_that_knows_all(
    num_routers: int, at_most: float
) -> None:
    seeds = (0, 1)
    ours_s = sum(mean_ttft(num_routers, seed) for seed in seeds)
    assert ours_s <= at_most * sum(mean_ttft_omniscient(seed) for seed in seeds)
