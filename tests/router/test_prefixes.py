"""Which replicas have which prompts: lookups, forgetting, and what routing makes of it."""

import random

import pytest

from router.ledger import Ledger
from router.policies import POLICIES
from router.prefixes import MAX_HOLDERS, PrefixIndex, extend_chain, index_block_size

BLOCK = 4


def chain(*tokens: int, seed: object = None) -> list[int]:
    return extend_chain([], tokens, BLOCK, seed=seed)


def index_of(*replica_ids: str, capacity: int = 100) -> PrefixIndex:
    index = PrefixIndex()
    for replica_id in replica_ids:
        index.insert(replica_id, capacity)
    return index


def test_a_chain_has_one_hash_for_each_full_block() -> None:
    assert len(chain(*range(4 * BLOCK + 3))) == 4
    assert chain(1, 2, 3) == []


def test_a_chain_grows_as_if_it_had_been_made_at_once() -> None:
    tokens = list(range(40))
    assert extend_chain(chain(*tokens[:13]), tokens, BLOCK) == chain(*tokens)


def test_a_block_is_equal_only_after_equal_blocks() -> None:
    assert chain(1, 2, 3, 4, 5, 6, 7, 8)[1] != chain(9, 2, 3, 4, 5, 6, 7, 8)[1]


def test_prompts_of_different_tenants_have_nothing_in_common() -> None:
    assert chain(1, 2, 3, 4, seed="a") != chain(1, 2, 3, 4, seed="b")


@pytest.mark.parametrize(("engine", "ours"), [(16, 128), (48, 96), (256, 256), (1, 128)])
def test_small_blocks_are_taken_together(engine: int, ours: int) -> None:
    assert index_block_size(engine) == ours


def test_each_replica_is_known_by_the_longest_beginning_it_has() -> None:
    index = index_of("a", "b", "c")
    index.add("a", chain(*range(40)))
    index.add("b", chain(*range(12)))
    index.add("c", chain(7, 7, 7, 7))
    assert index.lookup(chain(*range(20), *range(100, 120))) == {"a": 5, "b": 3}


def test_of_a_beginning_that_all_have_only_some_are_named_and_the_best_always() -> None:
    index = index_of(*(f"r{number}" for number in range(100)))
    for number in range(100):
        index.add(f"r{number}", chain(1, 2, 3, 4))
    index.add("r70", chain(1, 2, 3, 4, 5, 6, 7, 8))
    hits = index.lookup(chain(1, 2, 3, 4, 5, 6, 7, 8))
    assert len(hits) == MAX_HOLDERS
    assert hits["r70"] == 2


def test_the_least_recently_used_blocks_are_forgotten_and_ends_before_beginnings() -> None:
    index = index_of("a", capacity=3)
    index.add("a", chain(*range(8)))
    index.add("a", chain(*range(100, 108)))
    assert index.lookup(chain(*range(8))) == {"a": 1}
    assert index.lookup(chain(*range(100, 108))) == {"a": 2}
    assert len(index) == 3


def test_memory_is_bounded_over_all_replicas() -> None:
    index = PrefixIndex(max_entries=10)
    for number in range(5):
        index.insert(f"r{number}", capacity=1000)
    for number in range(5):
        index.add(f"r{number}", chain(*range(400)))
    assert len(index) == 10


def test_a_replica_that_left_is_forgotten_and_comes_back_empty() -> None:
    index = index_of("a", "b")
    index.add("a", chain(*range(8)))
    index.remove("a")
    assert index.lookup(chain(*range(8))) == {}
    assert len(index) == 0
    index.insert("a", 100)
    assert index.lookup(chain(*range(8))) == {}


def test_trust_follows_what_engines_find() -> None:
    index = index_of("a")
    for _ in range(100):
        index.observe(num_predicted=100, num_cached=0)
    assert index.trust < 0.01
    for _ in range(100):
        index.observe(num_predicted=100, num_cached=128)
    assert index.trust == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("waits_s", "expected"),
    [
        pytest.param(0.0, "has-it", id="idle"),
        pytest.param(0.8, "has-it", id="wait-is-shorter-than-what-is-saved"),
        pytest.param(1.0, "empty", id="wait-is-longer-than-what-is-saved"),
    ],
)
def test_saved_prefill_is_weighed_against_waiting(waits_s: float, expected: str) -> None:
    """Cached it takes 0.1 s, otherwise 1 s."""
    ledger = Ledger()
    for replica_id in ("empty", "has-it"):
        ledger.insert(replica_id, 0.0)
    ledger.add("has-it", "r0", waits_s, now_s=0.0)
    snapshot = ledger.snapshot(0.0, request_s=1.0, cached={"has-it": (900, 0.1)})
    plan = POLICIES["p2c"](snapshot, random.Random(0))
    assert plan.replica_id == expected
    assert plan.finish_s == pytest.approx(min(1.0, waits_s + 0.1))


def test_the_replica_that_knows_the_prompt_is_compared_though_it_was_not_picked() -> None:
    ledger = Ledger(num_routers=2)
    for number in range(1000):
        ledger.insert(f"r{number}", 0.0)
    snapshot = ledger.snapshot(0.0, request_s=1.0, cached={"r7": (900, 0.1)})
    picked = {POLICIES["p2c"](snapshot, random.Random(seed)).replica_id for seed in range(20)}
    assert picked == {"r7"}
