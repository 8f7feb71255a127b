"""The account of a pair's reads: what has room, what silence means, how long an answer may take."""

import pytest

from kvtransfer.pair_reads import PairReads, ReadLimits, Silence

GB = 10**9
LIMITS = ReadLimits(timeout_s=5, bytes_at_once=GB)


def pair_with(num_bytes: int = 1000) -> PairReads[str]:
    pair: PairReads[str] = PairReads(LIMITS)
    pair.began("read", num_bytes, 100)
    return pair


def test_one_more_may_begin_until_so_many_bytes_are_under_way() -> None:
    pair = pair_with(GB - 1)
    assert pair.has_room
    pair.began("other", 5 * GB, 100)
    assert not pair.has_room
    pair.moved("other", 5 * GB, 1, 101)
    assert pair.has_room
    assert not pair.is_idle
    pair.ended("other")
    pair.ended("read")
    assert pair.is_idle


@pytest.mark.parametrize(
    ("reads", "expected_s"),
    [
        pytest.param([], 5 + 20, id="nothing is known: 50 MB/s"),
        pytest.param([(25 * GB, 1)], 5 + 4 / 25, id="a fast network"),
        pytest.param([(1000, 1)], 5 + 20, id="small reads say little"),
        pytest.param([(25 * GB, 1), (1000, 0.001)], 5 + 4 / 25, id="also after large ones"),
    ],
)
def test_an_answer_may_take_what_lies_before_it(
    reads: list[tuple[int, float]], expected_s: float
) -> None:
    pair: PairReads[str] = PairReads(LIMITS)
    for number, (num_bytes, seconds) in enumerate(reads):
        pair.began(str(number), num_bytes, 100)
        pair.moved(str(number), num_bytes, seconds, 100 + seconds)
        pair.ended(str(number))
    pair.began("read", GB, 200)
    assert pair.answer_timeout_s == pytest.approx(expected_s, rel=0.01)


@pytest.mark.parametrize(
    ("now_s", "expected"),
    [(104.9, Silence.NONE), (105.1, Silence.ASK)],
)
def test_a_silent_peer_is_asked(now_s: float, expected: Silence) -> None:
    assert pair_with().judge(now_s) is expected


@pytest.mark.parametrize(("now_s", "expected"), [(109.9, Silence.NONE), (110.2, Silence.GONE)])
def test_one_that_does_not_answer_is_gone(now_s: float, expected: Silence) -> None:
    pair = pair_with()
    pair.asked(105)
    assert pair.judge(now_s) is expected


def test_blocks_are_an_answer_as_well() -> None:
    pair = pair_with()
    pair.asked(105)
    pair.moved("read", 500, 9, 109)
    assert pair.judge(113.9) is Silence.NONE
    assert pair.judge(114.2) is Silence.GONE


def test_one_that_answers_is_waited_for_but_not_for_ever() -> None:
    pair = pair_with()
    for asked_s in (105, 110, 115, 120, 125, 130, 135, 140, 145):
        assert pair.judge(asked_s + 0.5) is Silence.ASK
        pair.asked(asked_s)
        pair.answered(asked_s)
        assert pair.judge(asked_s + 4.9) is Silence.NONE
    assert pair.judge(150.5) is Silence.GONE


def test_nothing_is_asked_of_a_peer_that_is_not_read() -> None:
    pair = pair_with()
    pair.ended("read")
    assert pair.judge(1000) is Silence.NONE
    pair.began("next", 1000, 1000)
    assert pair.judge(1004.9) is Silence.NONE
