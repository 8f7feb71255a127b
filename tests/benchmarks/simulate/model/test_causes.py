"""Each miss has its cause: made-up runs in which only one can be."""

from dataclasses import fields

import pytest

from benchmarks.simulate.model.causes import Causes, Witness
from benchmarks.simulate.model.fleet import Fleet, FleetSpec, feed
from benchmarks.simulate.model.profiles import LLAMA_8B_H100
from benchmarks.simulate.model.requests import Arrival
from router.slo import Slo

SPEC = FleetSpec(prefill=LLAMA_8B_H100, decode=LLAMA_8B_H100)
SLO = Slo(ttft_s=0.5, itl_s=0.05)
PROMPT_S = 0.11
"""Of 4000 tokens."""


def causes(arrivals: list[Arrival], *, num_ready: int = 1, num_starting: int = 0) -> Causes:
    fleet = Fleet(SPEC)
    assert fleet.decode is not None
    witness = Witness(fleet, SLO)
    for _ in range(num_ready):
        fleet.prefill.start(is_ready=True)
    for _ in range(num_starting):
        fleet.prefill.start()
    for _ in range(4):
        fleet.decode.start(is_ready=True)
    feed(fleet, arrivals)
    fleet.events.run_until(arrivals[-1].arrival_s + 300.0)
    return witness.causes(fleet.requests)


def prompts(rate: float, seconds: float, *, tokens: int = 4000) -> list[Arrival]:
    return [Arrival(number / rate, tokens, 20) for number in range(int(rate * seconds))]


def test_no_miss_has_no_cause() -> None:
    met = causes(prompts(2.0, 30.0))
    assert all(getattr(met, each.name) == 0.0 for each in fields(Causes))


@pytest.mark.parametrize(
    ("arrivals", "num_starting", "cause"),
    [
        (prompts(0.2, 60.0, tokens=60_000), 0, "too_long"),
        (prompts(3 / PROMPT_S, 20.0), 1, "ttft_starting"),
        (prompts(2 / PROMPT_S, 60.0), 0, "ttft_too_few"),
        ([*prompts(1.0, 60.0), *(Arrival(60.2, 4000, 20) for _ in range(12))], 0, "ttft_burst"),
    ],
    ids=["too-long", "starting", "too-few", "burst"],
)
def test_the_cause_of_late_first_tokens(
    arrivals: list[Arrival], num_starting: int, cause: str
) -> None:
    found = causes(arrivals, num_starting=num_starting)
    shares = {each.name: getattr(found, each.name) for each in fields(Causes)}
    assert shares[cause] > 0
    assert max(shares, key=shares.__getitem__) == cause


def test_too_many_answers_at_once_are_too_few_replicas() -> None:
    found = causes([Arrival(number * 0.005, 100, 800) for number in range(3000)], num_ready=8)
    assert found.itl_too_few + found.itl_kv > 0.1
    assert found.itl_starting == 0.0
