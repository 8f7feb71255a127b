"""Placement over pools without connections, as the simulator has them."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from kvtransfer.phase import Phase
from router.cost_fit import PoolCost
from router.costs import PrefillCost
from router.pairs import Pair, Pairs
from router.placement import Placer
from router.planner import PoolPlanner
from router.policies import POLICIES
from router.prediction import Predictor
from router.reroute import MIN_GAIN
from router.routes import Route, RoutePlan
from router.settings import RoutingSettings

SPLIT = RoutePlan(route=Route.PREFILL_FIRST, reason="default")
COST = PoolCost(prefill=PrefillCost(base_s=0.0, per_token_s=1e-3, per_token_squared_s=0.0))


@dataclass(frozen=True)
class Load:
    num_running: int = 0
    num_waiting: int = 0
    kv_usage_fraction: float = 0.0
    has_suspect: bool = False


@dataclass(frozen=True)
class Replica:
    replica_id: str
    load: Load = field(default_factory=Load)
    is_leaving: bool = False
    work_s: float = 0.0
    prefilling_s: float = 0.0
    kv_bytes_per_token: float | None = None
    num_ranks: int = 1


class Pool(PoolPlanner):
    """Two replicas at time 0."""

    def __init__(self, name: Phase) -> None:
        super().__init__(name, POLICIES["least_work"], random.Random(0), lambda: 0.0, cost=COST)
        self.replicas = {f"{name}-{number}": Replica(f"{name}-{number}") for number in range(2)}
        for replica_id in self.replicas:
            self.joined(replica_id, None)

    def __getitem__(self, replica_id: str) -> Replica:
        return self.replicas[replica_id]

    def __iter__(self) -> Iterator[Replica]:
        return iter(self.replicas.values())


@dataclass(frozen=True)
class Prompt:
    num_tokens: int
    num_output_tokens: int = 0
    max_tokens: int | None = None

    def blocks(self, block_size: int | None) -> list[int]:
        return []


def made(pairs: Pairs | None = None) -> tuple[Pool, Pool, Placer]:
    prefill, decode = Pool("prefill"), Pool("decode")
    placer = Placer(
        prefill,
        decode,
        RoutingSettings(),
        pairs=pairs or Pairs(),
        num_routers=2,
        predictor=Predictor(),
    )
    return prefill, decode, placer


@pytest.mark.parametrize(("gain_s", "moves"), [(0.99 * MIN_GAIN, False), (1.01 * MIN_GAIN, True)])
def test_a_prompt_leaves_its_replica_only_for_a_better_route(gain_s: float, moves: bool) -> None:
    prefill, _, placer = made()
    prefill.ledger.add("prefill-0", "other", 9.0, now_s=0.0)
    better = placer.better(Prompt(1000), SPLIT, here_s=1.0 + gain_s)
    assert (better is not None) == moves
    if better is not None:
        assert better.prefill_at.replica_id == "prefill-1"


def test_a_prompt_stays_where_no_other_replica_is_left() -> None:
    prefill, _, placer = made()
    for replica_id in prefill.replicas:
        prefill.left(replica_id)
    assert placer.better(Prompt(1000), SPLIT, here_s=99.0) is None


def test_a_transfer_goes_to_a_replica_that_can_read_there() -> None:
    pairs = Pairs()
    pairs.failed(Pair(prefill="prefill-0", decode="decode-0"), "no way", now_s=0.0)
    prefill, _, placer = made(pairs)
    assert placer.decode_replica(Prompt(1000), prefill["prefill-0"], 1e-4) == "decode-1"
    pairs.failed(Pair(prefill="prefill-0", decode="decode-1"), "no way", now_s=0.0)
    assert placer.decode_replica(Prompt(1000), prefill["prefill-0"], 1e-4) is None
