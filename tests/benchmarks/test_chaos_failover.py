"""Which streams have waited for another engine, and for how long."""

import pytest

from benchmarks.chaos_client import Outcome
from benchmarks.chaos_failover import IN_FLIGHT_S, pause_of

KILLED_S = 10.0


def outcome(*arrivals_s: float, start_s: float = 0.0) -> Outcome:
    return Outcome(
        case="c",
        start_s=start_s,
        end_s=100.0,
        answer=None,
        arrivals_s=(arrivals_s,),
        error=None,
    )


STEADY = tuple(9.0 + 0.1 * index for index in range(20))


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        pytest.param(outcome(*STEADY), None, id="went-on"),
        pytest.param(outcome(9.0, 9.5, 10.0, 13.0, 13.5, 14.0), 3.0, id="paused"),
        pytest.param(
            outcome(9.0, 9.5, 10.0 + IN_FLIGHT_S, 13.0, 13.5, 14.0), 3.0, id="one-was-in-flight"
        ),
        pytest.param(outcome(9.0, 9.1, 9.2, 9.3), None, id="had-ended"),
        pytest.param(outcome(9.0, 9.5, 10.1, 10.4, 15.0, 15.4), None, id="paused-later"),
        pytest.param(outcome(12.0, 12.1), 2.0, id="waited-for-the-first"),
        pytest.param(outcome(12.0, 12.1, start_s=11.0), None, id="came-later"),
        pytest.param(outcome(), None, id="no-token"),
    ],
)
def test_a_pause_is_the_gap_in_which_the_engine_ended(
    seen: Outcome, expected: float | None
) -> None:
    assert pause_of(seen, KILLED_S) == expected
