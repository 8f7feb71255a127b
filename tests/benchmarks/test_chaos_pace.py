"""A slow machine is given less to do and more time for it."""

import pytest

from benchmarks.chaos_pace import Pace, Pressure, Speed, plan_pace

PRESSURE = Pressure(load=0.5, fault_every=0.6, patience=5.0)


@pytest.mark.parametrize(
    ("speed", "expected"),
    [
        pytest.param(
            Speed(start_s=20.0, rate=4.0, token_rate=1280.0),
            Pace(
                duration_s=120.0,
                rate=2.0,
                fault_every_s=12.0,
                timeout_s=100.0,
                unread_s=60.0,
                freed_within_s=2.0,
                held_s=30.0,
                crowd_tokens=50,
            ),
            id="fast",
        ),
        pytest.param(
            Speed(start_s=60.0, rate=1.0, token_rate=320.0),
            Pace(
                duration_s=180.0,
                rate=0.5,
                fault_every_s=36.0,
                timeout_s=300.0,
                unread_s=120.0,
                freed_within_s=6.0,
                held_s=90.0,
                crowd_tokens=37,
            ),
            id="three times slower",
        ),
    ],
)
def test_plan_pace(speed: Speed, expected: Pace) -> None:
    assert plan_pace(speed, PRESSURE, least_s=120.0) == expected
