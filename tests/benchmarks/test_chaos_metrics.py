"""What is read from the router's metrics."""

from benchmarks.chaos_metrics import read_metrics, together

IDLE = """\
# TYPE pdserve_replicas gauge
pdserve_replicas{pool="prefill"} 2.0
pdserve_replicas{pool="decode"} 1.0
# TYPE pdserve_inflight gauge
pdserve_inflight{phase="decoding"} 0.0
# TYPE pdserve_replica_kv_usage_fraction gauge
pdserve_replica_kv_usage_fraction{pool="decode",replica="a"} 0.0
"""
BUSY = """\
# TYPE pdserve_inflight gauge
pdserve_inflight{phase="decoding"} 3.0
# TYPE pdserve_replica_running gauge
pdserve_replica_running{pool="decode",replica="a"} 3.0
# TYPE pdserve_replica_sent gauge
pdserve_replica_sent{pool="decode",replica="a"} 0.0
pdserve_replica_sent{pool="decode",replica="b"} 2.0
# TYPE pdserve_moves_total counter
pdserve_moves_total{cause="replica-died",pool="decode"} 4.0
# TYPE pdserve_called_back_total counter
pdserve_called_back_total 2.0
# TYPE pdserve_moves_created gauge
pdserve_moves_created{cause="replica-died",pool="decode"} 1.7e+09
"""


def test_idle() -> None:
    seen = read_metrics(IDLE)

    assert seen.num_live == {"prefill": 2, "decode": 1}
    assert seen.held == ()
    assert seen.moves == {}
    assert seen.num_moves is None


def test_busy() -> None:
    seen = read_metrics(BUSY)

    assert seen.num_live == {"prefill": 0, "decode": 0}
    assert seen.held == (
        "pdserve_inflight (phase decoding): 3",
        "pdserve_replica_running (pool decode, replica a): 3",
    )
    assert seen.moves == {
        "pdserve_moves_total (cause replica-died, pool decode)": 4.0,
        "pdserve_called_back_total": 2.0,
    }
    assert seen.num_moves == 4


def test_what_is_in_engines() -> None:
    seen = read_metrics(BUSY)

    assert (seen.num_sent, seen.num_in_engine) == (3, {"a": 3})
    assert seen.with_own == {"b"}


def test_routers_together() -> None:
    one, other = read_metrics(IDLE), read_metrics(BUSY + IDLE.replace("2.0", "1.0"))

    seen = together([one, other])

    assert seen is not None
    assert seen.num_live == {"prefill": 1, "decode": 1}
    assert (seen.num_routers, seen.num_sent, seen.num_in_engine) == (2, 3, {"a": 3})
    assert seen.num_moves == 4
    assert seen.held == other.held


def test_what_a_dead_router_counted_is_not_forgotten() -> None:
    seen = together([read_metrics(IDLE)], [read_metrics(BUSY)])

    assert seen is not None
    assert (seen.num_moves, seen.num_routers, seen.num_sent, seen.held) == (4, 1, 0, ())


def test_no_router_answers() -> None:
    assert together([], [read_metrics(BUSY)]) is None


def test_moves_are_counted_but_there_was_none() -> None:
    text = "# HELP pdserve_moves_total Moves.\n# TYPE pdserve_moves_total counter\n"

    assert read_metrics(text).num_moves == 0
