"""Tests of which late prompts give way: a pure function, so a table."""

import pytest

from engine.lateness import PUT_BACK_S, LastStep, put_back

ARRIVAL_S = 1000.0
LATEST_START_MS = 1_000_400
"""0.4 s after it came."""
FULL = LastStep(seconds=0.2, num_prefill_tokens=8000, is_full=True)
ROOMY = LastStep(seconds=0.2, num_prefill_tokens=4000)


@pytest.mark.parametrize(
    ("waited_s", "num_tokens", "num_ahead", "last", "is_put_back"),
    [
        pytest.param(0.3, 2000, 0, LastStep(), False, id="in-time"),
        pytest.param(0.5, 2000, 0, LastStep(), True, id="late"),
        pytest.param(0.3, 2000, 0, FULL, True, id="late-with-what-else-is-in-the-step"),
        pytest.param(0.3, 8000, 0, FULL, False, id="has-the-step-to-itself"),
        pytest.param(0.3, 9000, 0, FULL, True, id="late-with-what-else-is-in-its-second-step"),
        pytest.param(0.3, 16000, 0, FULL, False, id="has-two-steps-to-itself"),
        pytest.param(0.1, 2000, 6000, FULL, False, id="in-time-behind-others"),
        pytest.param(0.1, 2000, 7000, FULL, True, id="one-step-later-behind-others"),
        pytest.param(0.1, 2000, 7000, ROOMY, False, id="steps-have-room"),
        pytest.param(
            0.3, 9000, 7000, ROOMY, False, id="has-a-step-to-itself-where-steps-have-room"
        ),
        pytest.param(PUT_BACK_S + 1.0, 2000, 0, FULL, False, id="has-been-put-back"),
    ],
)
def test_late_prompts_are_put_back_once(
    waited_s: float, num_tokens: int, num_ahead: int, last: LastStep, is_put_back: bool
) -> None:
    later_ms = put_back(
        LATEST_START_MS,
        num_tokens,
        num_ahead=num_ahead,
        arrival_s=ARRIVAL_S,
        now_s=ARRIVAL_S + waited_s,
        last=last,
    )
    assert later_ms == (LATEST_START_MS + 1000 * PUT_BACK_S if is_put_back else None)


def test_once_is_enough() -> None:
    """However urgent a client says it is, the engine must not put it back again and again."""
    for latest_start_ms in (-(10**9), 0, 1_000_000, LATEST_START_MS):
        now_s = ARRIVAL_S + 1.0
        later_ms = put_back(latest_start_ms, 10, arrival_s=ARRIVAL_S, now_s=now_s, last=FULL)
        if later_ms is None:
            continue
        for waited_s in (1.0, PUT_BACK_S - 0.1, PUT_BACK_S + 0.5, 1000.0):
            now_s = ARRIVAL_S + waited_s
            assert put_back(later_ms, 10, arrival_s=ARRIVAL_S, now_s=now_s, last=FULL) is None


def test_who_was_late_before_it_came_has_asked_to_go_first() -> None:
    urgent_ms = round(1000 * (ARRIVAL_S - 2.0))
    assert put_back(urgent_ms, 10, arrival_s=ARRIVAL_S, now_s=ARRIVAL_S, last=FULL) is None
