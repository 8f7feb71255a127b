"""When a request that has lost its engine gets another, and when it is cleared."""

import pytest

from router.recovery import (
    IN_FLIGHT_TOKENS,
    MOST_HANGS,
    Failures,
    Hang,
    RecoveryLimits,
    one_more,
    plan_move,
)

LIMITS = RecoveryLimits(max_moves=3, max_wait_s=120.0, stall_timeout_s=10.0)
SAME_PLACE = "3 engines failed at the same place"
ALONE = "3 engines failed that had nothing else"
MOVED = "its engine is gone"


def failures(num: int, *, num_tokens: int = 40, was_prefilling: bool = False) -> Failures:
    return Failures(num_ended=num, num_tokens=num_tokens, was_prefilling=was_prefilling)


@pytest.mark.parametrize(
    ("with_it", "num_alone", "num_moves", "reason"),
    [
        pytest.param(None, 0, 0, MOVED, id="no engine failed"),
        pytest.param(failures(1), 1, 0, MOVED, id="one"),
        pytest.param(failures(2), 2, 1, MOVED, id="two"),
        pytest.param(failures(3), 0, 2, SAME_PLACE, id="three"),
        pytest.param(failures(1), 3, 2, ALONE, id="three that had nothing else"),
        pytest.param(None, 0, 3, "it was moved 3 times already", id="moved too often"),
    ],
)
def test_plan_move(with_it: Failures | None, num_alone: int, num_moves: int, reason: str) -> None:
    plan = plan_move(
        num_moves=num_moves, failures=with_it, num_alone=num_alone, num_hangs=0, limits=LIMITS
    )

    assert (plan.moves, plan.reason) == (reason == MOVED, reason)


@pytest.mark.parametrize(("num_hangs", "moves"), [(MOST_HANGS - 1, True), (MOST_HANGS, False)])
def test_who_hangs_engines_at_ever_other_places_is_refused_too(num_hangs: int, moves: bool) -> None:
    plan = plan_move(
        num_moves=0, failures=failures(1), num_alone=0, num_hangs=num_hangs, limits=LIMITS
    )
    assert plan.moves is moves


def test_failures_add_up_to_a_suspect() -> None:
    first = one_more(None, num_tokens=40, was_prefilling=True)
    second = one_more(first, num_tokens=41, was_prefilling=False)
    assert (first, first.makes_suspect) == (failures(1, was_prefilling=True), False)
    assert (second, second.makes_suspect) == (failures(2, num_tokens=41), True)


@pytest.mark.parametrize(
    ("with_it", "num_tokens", "expected"),
    [
        pytest.param(failures(1), 40, False, id="where it failed"),
        pytest.param(failures(1), 40 + IN_FLIGHT_TOKENS, False, id="may have been in flight"),
        pytest.param(failures(1), 41 + IN_FLIGHT_TOKENS, True, id="past the place"),
        pytest.param(failures(1, was_prefilling=True), 40, False, id="not read yet"),
        pytest.param(failures(1, was_prefilling=True), 41, True, id="read elsewhere"),
    ],
)
def test_a_request_is_cleared(with_it: Failures, num_tokens: int, expected: bool) -> None:
    assert with_it.clears(num_tokens) is expected


@pytest.mark.parametrize(
    ("seen", "num"),
    [
        pytest.param([("a", 0), ("b", 20), ("c", 40)], 3, id="one after the other"),
        pytest.param([("a", 0), ("b", 10), ("c", 20)], 3, id="as soon as one request can"),
        pytest.param([("a", 0), ("b", 9), ("c", 40)], 1, id="two at once"),
        pytest.param(
            [("a", 0), ("b", 20), ("c", 40), ("other", 42)], 2, id="another with the last"
        ),
        pytest.param(
            [("other", -2), ("a", 0), ("another", 22), ("b", 20), ("third", 40), ("c", 41)],
            0,
            id="always with another",
        ),
        pytest.param([("a", 0), ("a", 5), ("b", 20)], 3, id="the same one again"),
    ],
)
def test_hangs_count_that_hit_one_engine(seen: list[tuple[str, float]], num: int) -> None:
    every = [Hang(replica_id=replica_id, at_s=at_s) for replica_id, at_s in seen]
    with_it: Failures | None = None
    for hang in every:
        if hang.replica_id in ("a", "b", "c"):
            with_it = one_more(
                with_it,
                num_tokens=40,
                was_prefilling=False,
                hang=hang,
                all_hangs=every,
                stall_timeout_s=LIMITS.stall_timeout_s,
            )
    assert with_it is not None
    assert with_it.num == num
