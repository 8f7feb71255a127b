"""Which pairs may be used, when broken ones are tried again, and when a replica may join."""

import random

import pytest

from router.pairs import (
    AT_LATEST_S,
    FIRST_RETRY_S,
    MOST_RETRY_S,
    PATIENCE_S,
    PROBATION_S,
    Pair,
    Pairs,
    may_join,
)


def pair(name: str) -> Pair:
    prefill, decode = name.split("-")
    return Pair(prefill=prefill, decode=decode)


def with_unready(*names: str) -> Pairs:
    pairs = Pairs()
    for name in names:
        pairs.failed(pair(name), "no route to host", now_s=0.0)
    return pairs


@pytest.mark.parametrize(
    ("unready", "open_decodes", "stranded", "barred_for_p0"),
    [
        pytest.param([], {"d0", "d1"}, set(), set(), id="all-ready"),
        pytest.param(["p0-d0"], {"d0", "d1"}, set(), {"d0"}, id="one-pair"),
        pytest.param(["p0-d0"], {"d0"}, {"p0"}, {"d0"}, id="the-only-decode"),
        pytest.param(["p0-d0", "p0-d1"], {"d0", "d1"}, {"p0"}, {"d0", "d1"}, id="prefill-alone"),
        pytest.param(["p0-d0", "p1-d0", "p2-d0"], {"d0", "d1"}, set(), {"d0"}, id="decode-alone"),
        pytest.param(["p0-d0", "p0-d9"], {"d0", "d1"}, set(), {"d0", "d9"}, id="d1-is-left"),
        pytest.param(
            ["p0-d0", "p0-d9"], {"d0"}, {"p0"}, {"d0", "d9"}, id="the-other-does-not-open"
        ),
        pytest.param(["p0-d0"], set(), set(), {"d0"}, id="no-decode-to-go-to"),
    ],
)
def test_what_routing_may_use(
    unready: list[str], open_decodes: set[str], stranded: set[str], barred_for_p0: set[str]
) -> None:
    pairs = with_unready(*unready)
    assert pairs.stranded(open_decodes) == stranded
    assert pairs.barred("p0") == barred_for_p0
    assert len(pairs) == len(unready)


def retry_waits(num: int) -> list[float]:
    """Seconds until each of so many retries in a row, as `due` has them."""
    pairs, now_s, waits = Pairs(), 0.0, []
    for _ in range(num):
        pairs.failed(pair("p-d"), "no", now_s)
        ((_, unready),) = pairs
        assert unready.retry_s is not None
        assert pairs.due(unready.retry_s - 0.01) == ()
        assert pairs.due(unready.retry_s) == (pair("p-d"),)
        waits.append(unready.retry_s - now_s)
        now_s = unready.retry_s
        pairs.trying(pair("p-d"))
        assert pairs.due(now_s + 1000) == (), "it is being tried"
    return waits


def test_a_pair_that_fails_is_tried_again_ever_later() -> None:
    waits = retry_waits(8)
    assert waits[:3] == [FIRST_RETRY_S, 2 * FIRST_RETRY_S, 4 * FIRST_RETRY_S]
    assert waits[-1] == MOST_RETRY_S


def test_a_pair_is_barred_from_its_first_try_until_it_is_ready() -> None:
    pairs = Pairs()
    assert pairs.is_ready(pair("p-d"))
    pairs.trying(pair("p-d"))
    assert not pairs.is_ready(pair("p-d"))
    assert pairs.problem(pair("p-d")) is None
    pairs.ready(pair("p-d"), now_s=0.0)
    assert pairs.is_ready(pair("p-d"))
    assert len(pairs) == 0
    assert not pairs.stranded({"d"})


@pytest.mark.parametrize(
    ("well_for_s", "num_failures"),
    [pytest.param(1.0, 3, id="soon"), pytest.param(PROBATION_S + 1, 1, id="after-long")],
)
def test_failures_add_up_where_a_pair_only_seems_well(well_for_s: float, num_failures: int) -> None:
    pairs = with_unready("p-d")
    pairs.failed(pair("p-d"), "no", now_s=1.0)
    pairs.ready(pair("p-d"), now_s=2.0)
    pairs.failed(pair("p-d"), "two reads failed", now_s=2.0 + well_for_s)
    ((_, unready),) = pairs
    assert unready.num_failures == num_failures
    assert unready.problem == "two reads failed"


@pytest.mark.parametrize("gone", ["p0", "d0"])
def test_who_is_gone_leaves_nothing(gone: str) -> None:
    pairs = with_unready("p0-d0")
    pairs.ready(pair("p0-d0"), now_s=1.0)
    pairs.failed(pair("p0-d0"), "no", now_s=2.0)
    pairs.forget(gone)
    assert list(pairs) == []
    pairs.failed(pair("p0-d0"), "no", now_s=3.0)
    ((_, unready),) = pairs
    assert unready.num_failures == 1, "it is somebody else by that name"


@pytest.mark.parametrize(
    ("is_prefill", "ready", "trying", "failed", "waited_s", "joins"),
    [
        pytest.param(True, 0, 0, 0, 0.0, True, id="prefill-with-no-decode"),
        pytest.param(False, 0, 0, 0, 0.0, True, id="decode-with-no-prefill"),
        pytest.param(True, 3, 0, 0, 0.1, True, id="all-ready"),
        pytest.param(True, 2, 1, 0, 0.1, False, id="the-last-is-about-to"),
        pytest.param(True, 2, 1, 0, PATIENCE_S, True, id="the-last-takes-long"),
        pytest.param(True, 1, 0, 2, 0.1, True, id="others-failed"),
        pytest.param(True, 0, 1, 2, AT_LATEST_S, False, id="prefill-waits-for-its-first-pair"),
        pytest.param(True, 0, 0, 3, AT_LATEST_S, False, id="prefill-is-of-no-use"),
        pytest.param(False, 0, 3, 0, PATIENCE_S, False, id="decode-waits-for-its-first-pair"),
        pytest.param(False, 0, 0, 3, 0.1, True, id="decode-does-whole-requests"),
        pytest.param(False, 0, 3, 0, AT_LATEST_S, True, id="decode-has-waited"),
    ],
)
def test_when_a_replica_may_join(
    is_prefill: bool, ready: int, trying: int, failed: int, waited_s: float, joins: bool
) -> None:
    found = may_join(
        is_prefill=is_prefill,
        num_ready=ready,
        num_trying=trying,
        num_failed=failed,
        waited_s=waited_s,
    )
    assert found is joins


@pytest.mark.parametrize("seed", range(5))
def test_stranded_is_what_barred_says(seed: int) -> None:
    rng = random.Random(seed)
    prefills, decodes = [f"p{n}" for n in range(4)], [f"d{n}" for n in range(4)]
    pairs = Pairs()
    for now in range(300):
        each = Pair(prefill=rng.choice(prefills), decode=rng.choice(decodes))
        what = rng.choice(["trying", "ready", "failed", "failed", "forget"])
        if what == "trying":
            pairs.trying(each)
        elif what == "ready":
            pairs.ready(each, float(now))
        elif what == "failed":
            pairs.failed(each, "no", float(now))
        else:
            pairs.forget(rng.choice([each.prefill, each.decode]))
        opened = set(rng.sample(decodes, rng.randint(1, 4)))
        assert pairs.stranded(opened) == {
            prefill
            for prefill in prefills
            if not any(pairs.is_ready(Pair(prefill=prefill, decode=other)) for other in opened)
        }
        assert len(pairs) == len(list(pairs))
