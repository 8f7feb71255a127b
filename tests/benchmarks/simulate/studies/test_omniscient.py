"""The router that all others are held against knows what no report tells."""

from benchmarks.simulate.model.fleet import FleetSpec
from benchmarks.simulate.model.profiles import LLAMA_8B_H100
from benchmarks.simulate.model.requests import Arrival, SimRequest
from benchmarks.simulate.studies.routing import OmniscientFleet


def test_the_omniscient_router_goes_by_the_true_work_of_engines() -> None:
    fleet = OmniscientFleet(FleetSpec(prefill=LLAMA_8B_H100, decode=None, policy="least_work"))
    first, second = (fleet.prefill.start(is_ready=True) for _ in range(2))
    # No ledger has it.
    first.engine.submit(SimRequest(Arrival(0.0, 8000, 1), 99))
    fleet.submit(Arrival(0.0, 100, 1))
    fleet.events.run_until(0.001)
    assert first.engine.num_requests == second.engine.num_requests == 1
