"""The load generator's pure parts: percentiles, event parsing, traces and their summary."""

import json

import pytest

from benchmarks.http_stream import Piece, Response
from benchmarks.load import (
    LoadError,
    RequestTrace,
    parse_events,
    percentile,
    summarise,
    trace_request,
)


@pytest.mark.parametrize(
    ("values", "fraction", "expected"),
    [
        pytest.param([3.0], 0.5, 3.0, id="one value is every percentile"),
        pytest.param([1.0, 3.0], 0.5, 2.0, id="between two values"),
        pytest.param([4.0, 1.0, 3.0, 2.0], 1.0, 4.0, id="the highest, unsorted"),
        pytest.param([0.0, 1.0, 2.0, 3.0, 4.0], 0.9, 3.6, id="interpolated"),
    ],
)
def test_percentile(values: list[float], fraction: float, expected: float) -> None:
    assert percentile(values, fraction) == pytest.approx(expected)


def test_percentile_of_nothing() -> None:
    with pytest.raises(ValueError, match="nothing"):
        percentile([], 0.5)


def _pieces(*bodies: bytes) -> tuple[Piece, ...]:
    return tuple(Piece(arrival_s=float(at), body=body) for at, body in enumerate(bodies, start=1))


@pytest.mark.parametrize(
    ("bodies", "expected"),
    [
        pytest.param([b"data: a\n\n", b"data: b\n\n"], [(1.0, "a"), (2.0, "b")], id="one each"),
        pytest.param([b"data: a\n\ndata: b\n\n"], [(1.0, "a"), (1.0, "b")], id="two in a piece"),
        pytest.param([b"data: a", b"b\n", b"\n"], [(3.0, "ab")], id="split: its last byte counts"),
        pytest.param([b": ping\n\ndata: a\n\n"], [(1.0, "a")], id="a comment is no event"),
        pytest.param([b"data: a\n\ndata: lost"], [(1.0, "a")], id="an unfinished event is none"),
    ],
)
def test_parse_events(bodies: list[bytes], expected: list[tuple[float, str]]) -> None:
    assert list(parse_events(_pieces(*bodies))) == expected


def _event(**fields: object) -> bytes:
    return b"data: " + json.dumps({"choices": [], **fields}).encode() + b"\n\n"


TOKEN = _event(choices=[{"text": ""}])
USAGE = _event(usage={"completion_tokens": 3})
DONE = b"data: [DONE]\n\n"


def test_trace_request() -> None:
    response = Response(
        status=200, start_s=0.25, pieces=_pieces(TOKEN, TOKEN + TOKEN, USAGE + DONE)
    )

    trace = trace_request(response)

    assert trace == RequestTrace(
        start_s=0.25, token_arrivals_s=(1.0, 2.0, 2.0), num_output_tokens=3
    )
    assert trace.ttft_s == 0.75
    assert trace.gaps_s == (1.0, 0.0)


@pytest.mark.parametrize(
    ("status", "bodies", "message"),
    [
        pytest.param(503, [b"no replica"], "HTTP 503: no replica", id="refused"),
        pytest.param(200, [TOKEN, _event(error={})], "error in the stream", id="fails midway"),
        pytest.param(200, [TOKEN, TOKEN], "without tokens or without usage", id="cut short"),
        pytest.param(200, [USAGE, DONE], "without tokens or without usage", id="no token"),
    ],
)
def test_trace_request_that_failed(status: int, bodies: list[bytes], message: str) -> None:
    with pytest.raises(LoadError, match=message):
        trace_request(Response(status=status, start_s=0.0, pieces=_pieces(*bodies)))


def test_summarise_counts_tokens_not_events() -> None:
    traces = [
        RequestTrace(start_s=0.0, token_arrivals_s=(1.0, 3.0), num_output_tokens=5),
        RequestTrace(start_s=0.0, token_arrivals_s=(2.0, 2.5, 4.0), num_output_tokens=3),
    ]

    summary = summarise(traces, wall_s=4.0, client_cpu_s=0.2, real_time_client=True)

    assert summary.ttft_s_p50 == 1.5
    assert summary.itl_s_mean == pytest.approx((0.5 + 1.0) / 2)
    assert summary.handover_s_p50 == pytest.approx(1.25)
    assert summary.tokens_per_s == 2.0
    assert summary.client_cpu_fraction == pytest.approx(0.05)


def test_summarise_single_tokens() -> None:
    trace = RequestTrace(start_s=0.0, token_arrivals_s=(1.0,), num_output_tokens=1)

    summary = summarise([trace], wall_s=1.0, client_cpu_s=0.0, real_time_client=False)

    assert summary.itl_s_mean is None
    assert summary.handover_s_p50 is None
    assert summary.gap_s_p50 is None
