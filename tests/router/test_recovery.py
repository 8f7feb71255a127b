"""When a request that has lost its engine gets another."""

import pytest

from router.recovery import IN_FLIGHT_TOKENS, Death, RecoveryLimits, is_suspect, plan_move

LIMITS = RecoveryLimits(max_moves=3, max_wait_s=120.0)
SAME_PLACE = "two engines died with it at the same place"
ALONE = "two engines died that had nothing else"
MOVED = "its engine is gone"


def death(num_tokens: int, *, was_alone: bool = False, was_reading: bool = False) -> Death:
    return Death(num_tokens=num_tokens, was_alone=was_alone, was_reading=was_reading)


@pytest.mark.parametrize(
    ("before", "now", "num_moves", "reason"),
    [
        pytest.param(None, None, 0, MOVED, id="drained"),
        pytest.param(None, death(0), 0, MOVED, id="first death"),
        pytest.param(death(5), None, 1, MOVED, id="drained after a death"),
        pytest.param(death(0), death(0), 1, SAME_PLACE, id="at the prompt, twice"),
        pytest.param(
            death(0, was_reading=True),
            death(0, was_reading=True),
            1,
            SAME_PLACE,
            id="reading the prompt, twice",
        ),
        pytest.param(
            death(5, was_alone=True),
            death(5, was_alone=True, was_reading=True),
            1,
            MOVED,
            id="writing, then reading for the next",
        ),
        pytest.param(death(40), death(40), 1, SAME_PLACE, id="at the same token, twice"),
        pytest.param(
            death(40), death(40 + IN_FLIGHT_TOKENS), 1, SAME_PLACE, id="the first was ahead"
        ),
        pytest.param(death(40), death(41 + IN_FLIGHT_TOKENS), 1, MOVED, id="it got further"),
        pytest.param(
            death(40, was_alone=True), death(200, was_alone=True), 1, ALONE, id="alone, twice"
        ),
        pytest.param(
            death(40), death(200, was_alone=True), 1, MOVED, id="beside another the first time"
        ),
        pytest.param(
            death(40, was_alone=True), death(200), 1, MOVED, id="beside another the second time"
        ),
        pytest.param(None, None, 3, "it was moved 3 times already", id="moved too often"),
    ],
)
def test_plan_move(before: Death | None, now: Death | None, num_moves: int, reason: str) -> None:
    plan = plan_move(num_moves=num_moves, before=before, death=now, limits=LIMITS)

    assert (plan.moves, plan.reason) == (reason == MOVED, reason)


@pytest.mark.parametrize(
    ("last", "num_tokens", "expected"),
    [
        pytest.param(None, 0, False, id="no engine has died"),
        pytest.param(death(10), 10, True, id="where it died"),
        pytest.param(death(10), 10 + IN_FLIGHT_TOKENS, True, id="may have been in flight"),
        pytest.param(death(10), 11 + IN_FLIGHT_TOKENS, False, id="past the place"),
    ],
)
def test_is_suspect(last: Death | None, num_tokens: int, expected: bool) -> None:
    assert is_suspect(last, num_tokens) is expected
