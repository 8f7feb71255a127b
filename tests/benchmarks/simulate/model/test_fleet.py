"""The simulated cluster: requests all end, whatever happens, and a seed is a run."""

import random
from dataclasses import replace

import pytest

from benchmarks.simulate.model.fleet import Fleet, FleetSpec, Nodes, feed, run_fixed
from benchmarks.simulate.model.profiles import LLAMA_8B_H100, OPT_13B_VLLM
from benchmarks.simulate.model.requests import Arrival
from benchmarks.simulate.workloads.lengths import Lognormal, poisson
from router.phases import RequestPhase
from router.policies import POLICIES

SPEC = FleetSpec(prefill=LLAMA_8B_H100, decode=LLAMA_8B_H100)


def made_workload(rate: float = 20.0, duration_s: float = 20.0) -> list[Arrival]:
    prompts, answers = Lognormal(mean=2000, sigma=0.8), Lognormal(mean=100, sigma=0.8)

    def lengths(time_s: float, rng: random.Random) -> tuple[int, int]:
        return prompts.draw(rng), answers.draw(rng)

    return poisson(lambda _: rate, most=rate, duration_s=duration_s, lengths=lengths, seed=3)


def times(fleet: Fleet) -> list[tuple[float | None, float | None]]:
    return [(each.first_token_s, each.ended_s) for each in fleet.requests]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_routers", [1, 3])
def test_every_request_ends_with_every_policy(policy: str, num_routers: int) -> None:
    spec = replace(SPEC, policy=policy, num_routers=num_routers)
    fleet = run_fixed(spec, made_workload(), num_prefill=3, num_decode=2)
    assert all(each.phase is RequestPhase.ENDED for each in fleet.requests)
    assert all(each.num_output_tokens == each.arrival.output_tokens for each in fleet.requests)
    assert fleet.num_ongoing == fleet.num_decoding == 0
    assert fleet.prefill_backlog_s == pytest.approx(0.0, abs=1e-6)
    assert all(each.engine.kv_used == 0 for pool in fleet.pools for each in pool.replicas)


BOTH_READ = replace(SPEC, ttft_s=0.5, itl_s=0.05)


def num_late(fleet: Fleet) -> int:
    return sum((each.ttft_s or 9.0) > 0.5 for each in fleet.requests)


def test_decode_reads_what_prefill_would_be_late_with() -> None:
    """Prompts of 4000 tokens, more than one prefill engine reads, on decode engines with time."""
    workload = [Arrival(number * 0.09, 4000, 40) for number in range(200)]
    alone = run_fixed(replace(BOTH_READ, itl_s=None), workload, num_prefill=1, num_decode=2)
    both = run_fixed(BOTH_READ, workload, num_prefill=1, num_decode=2)
    assert alone.num_read_in_decode == 0
    assert both.num_read_in_decode > 20
    assert num_late(both) < 0.7 * num_late(alone)
    assert all((each.tpot_s or 9.0) <= 0.05 for each in both.requests)


def test_decode_reads_no_long_prompt_that_prefill_is_in_time_with() -> None:
    workload = [Arrival(number * 0.2, 4000, 40) for number in range(100)]
    assert run_fixed(BOTH_READ, workload, num_prefill=1, num_decode=2).num_read_in_decode == 0


@pytest.mark.parametrize("pool", ["prefill", "decode"])
def test_a_fault_while_decode_reads_leaves_nothing_behind(pool: str) -> None:
    fleet = Fleet(BOTH_READ)
    for _ in range(2):
        fleet.prefill.start(is_ready=True)
        assert fleet.decode is not None
        fleet.decode.start(is_ready=True)
    workload = [Arrival(number * 0.04, 4000, 40) for number in range(300)]
    feed(fleet, workload)
    fleet.events.run_until(6.0)
    assert fleet.num_read_in_decode > 0
    fleet.fail(getattr(fleet, pool).ready[0])
    fleet.events.run_until(600.0)
    assert all(each.phase is RequestPhase.ENDED for each in fleet.requests)
    assert fleet.num_ongoing == fleet.num_decoding == 0
    assert all(each.engine.kv_used == 0 for pool in fleet.pools for each in pool.ready)
    assert not any(each for router in fleet.routers for each in router.decode.prefilling.values())


def test_a_seed_is_a_run() -> None:
    spec = replace(SPEC, num_routers=4, policy="random")
    first = run_fixed(spec, made_workload(), num_prefill=3, num_decode=2)
    again = run_fixed(spec, made_workload(), num_prefill=3, num_decode=2)
    other = run_fixed(replace(spec, seed=1), made_workload(), num_prefill=3, num_decode=2)
    assert times(first) == times(again)
    assert times(first) != times(other)


def test_one_pool_does_both_phases_as_plain_vllm_does() -> None:
    workload = [Arrival(number * 1.0, 500, 20) for number in range(10)]
    fleet = run_fixed(FleetSpec(prefill=OPT_13B_VLLM, decode=None), workload, num_prefill=1)
    assert all(each.phase is RequestPhase.ENDED for each in fleet.requests)
    idle_s = OPT_13B_VLLM.idle_ttft_s(500)
    assert all(each.ttft_s == pytest.approx(idle_s) for each in fleet.requests)


@pytest.mark.parametrize("pool", ["prefill", "decode"])
def test_requests_survive_the_death_of_their_replica(pool: str) -> None:
    fleet = Fleet(SPEC)
    assert fleet.decode is not None
    for each in (fleet.prefill, fleet.decode):
        each.start(is_ready=True)
        each.start(is_ready=True)
    feed(fleet, made_workload(rate=60.0))
    victim = (fleet.prefill if pool == "prefill" else fleet.decode).replicas[0]
    fleet.events.at(10.0, lambda: fleet.fail(victim))
    fleet.events.run_until(300.0)
    assert any(each.num_moves for each in fleet.requests)
    assert all(each.phase is RequestPhase.ENDED for each in fleet.requests)
    assert fleet.num_decoding == 0


def test_requests_wait_for_a_pool_that_starts() -> None:
    fleet = Fleet(SPEC)
    assert fleet.decode is not None
    fleet.prefill.start()
    fleet.decode.start(is_ready=True)
    fleet.submit(Arrival(0.0, 100, 2))
    fleet.events.run_until(LLAMA_8B_H100.start_s - 0.1)
    (waiting,) = fleet.requests
    assert waiting.phase.value == "waiting"
    fleet.events.run_until(LLAMA_8B_H100.start_s + 1.0)
    assert waiting.phase.value == "ended"


def test_gpu_seconds_count_starts_and_drains() -> None:
    fleet = Fleet(SPEC)
    fleet.prefill.scale_to(2)
    fleet.events.run_until(10.0)
    fleet.prefill.scale_to(1)  # the one that starts last is called off
    fleet.events.run_until(60.0)
    assert fleet.prefill.gpu_seconds() == pytest.approx(10.0 + 60.0)
    assert len(fleet.prefill.ready) == 1
    assert fleet.prefill.num_scalings == 2


def test_a_draining_replica_finishes_what_it_has() -> None:
    fleet = Fleet(SPEC)
    assert fleet.decode is not None
    fleet.prefill.start(is_ready=True)
    fleet.decode.start(is_ready=True)
    fleet.decode.start(is_ready=True)
    for _ in range(10):
        fleet.submit(Arrival(0.0, 100, 200))
    fleet.events.run_until(1.0)
    fleet.decode.scale_to(1)
    assert fleet.decode.num_present == 2
    fleet.events.run_until(60.0)
    assert fleet.decode.num_present == 1
    assert all(each.phase is RequestPhase.ENDED for each in fleet.requests)
    assert not any(each.num_moves for each in fleet.requests)


def test_kv_stays_on_its_node_where_the_network_is_slow_and_work_does_not_pile_up() -> None:
    """Prompts of 2000 tokens are 260 MB: 7 ms within a node, 0.26 s between two."""
    slow = Nodes(num=2, bytes_per_s=1e9)
    fleets = {
        seen: run_fixed(
            replace(SPEC, num_routers=2, nodes=replace(slow, seen=seen)),
            made_workload(),
            num_prefill=4,
            num_decode=4,
        )
        for seen in (False, True)
    }
    blind, seeing = fleets[False], fleets[True]
    assert blind.num_near < 0.7 * len(blind.requests)
    assert seeing.num_near > 0.9 * len(seeing.requests)
    tpot_s = {
        seen: [each.tpot_s or 9.0 for each in fleet.requests] for seen, fleet in fleets.items()
    }
    assert sum(tpot_s[True]) < 0.9 * sum(tpot_s[False])
    assert max(tpot_s[True]) <= max(tpot_s[False])


def test_a_network_as_fast_as_a_node_leaves_the_choice_to_work() -> None:
    fast = Nodes(num=2, bytes_per_s=LLAMA_8B_H100.link_bytes_per_s)
    fleet = run_fixed(replace(SPEC, nodes=fast), made_workload(), num_prefill=4, num_decode=4)
    assert 0.4 < fleet.num_near / len(fleet.requests) < 0.7
