"""When a decode engine says of a pair that it does not work."""

import pytest

from decode.failing_reads import MOST_IN_A_ROW, FailingReads
from kvtransfer.stats import PairDelta


def read(engine_id: str, *, transfers: int = 0, failures: int = 0) -> PairDelta:
    return PairDelta(
        remote_engine_id=engine_id,
        num_bytes=0,
        seconds=0.0,
        num_transfers=transfers,
        num_copies=0,
        num_failures=failures,
        num_ended_leases=0,
    )


@pytest.mark.parametrize(
    ("steps", "named"),
    [
        pytest.param([[read("p", transfers=9)]], [()], id="well"),
        pytest.param([[read("p", failures=MOST_IN_A_ROW)]], [("p",)], id="at-once"),
        pytest.param([[read("p", failures=1)]] * 5, [(), (), (), ("p",), ()], id="one-by-one"),
        pytest.param([[read("p", failures=3)], [read("p", transfers=1, failures=9)],
                      [read("p", failures=3)]], [(), (), ()], id="one-went-well"),
        pytest.param([[read("p", failures=2)], [], [read("p", failures=2)]],
                     [(), (), ("p",)], id="with-a-rest"),
        pytest.param([[read("p", failures=3), read("q", failures=4)], [read("p", failures=1)]],
                     [("q",), ("p",)], id="each-by-itself"),
        pytest.param([[read("p", failures=4)], [read("p", failures=4)]],
                     [("p",), ("p",)], id="again"),
    ],
)  # fmt: skip
def test_who_is_named(steps: list[list[PairDelta]], named: list[tuple[str, ...]]) -> None:
    reads = FailingReads()
    assert [reads.observe(moved) for moved in steps] == named


def test_who_is_gone_is_forgotten() -> None:
    reads = FailingReads()
    reads.observe([read("p", failures=MOST_IN_A_ROW - 1)])
    reads.forget(["p", "never-seen"])
    assert reads.observe([read("p", failures=1)]) == ()
