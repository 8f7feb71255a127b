"""Live measurements: what is read, what is fitted, and how the simulator does on made-up ones."""

import asyncio
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.load import LoadError, RequestTrace
from benchmarks.simulate.model.fleet import FleetSpec, run_fixed
from benchmarks.simulate.model.requests import Arrival
from benchmarks.simulate.model.shared_cores import Contention
from benchmarks.simulate.studies.live import (
    PROMPT_TOKENS,
    draw_arrivals,
    read_costs,
    run_open_loop,
    summarise_beside,
    summarise_load,
    summarise_single,
)
from benchmarks.simulate.studies.live_record import (
    Beside,
    LiveLoad,
    LiveRecord,
    LiveRecordError,
    LiveRequest,
    Single,
    compare_loads,
    fit_spec,
    format_points,
    read_record,
    write_record,
)
from benchmarks.simulate.studies.validate import check_live
from router.costs import DecodeCost, PrefillCost

PREFILL = PrefillCost(base_s=3e-3, per_token_s=4e-5, per_token_squared_s=2e-9)
DECODE = DecodeCost(base_s=1.5e-3, per_request_s=3e-4, per_context_token_s=1e-7)
EDGE_S, HANDOVER_S, OVERHEAD_S = 5e-3, 4e-3, 5e-4
PER_ANSWER_S = 2e-4
"""Beyond the engine's step, for each answer in it."""
CONTENTION = Contention(prefill=1.5, decode=1.2)


def single(prompt_tokens: int) -> Single:
    """As a cluster with exactly these costs would show it."""
    prompt_s = PREFILL.seconds(num_uncached=prompt_tokens, num_tokens=prompt_tokens)
    context = prompt_tokens + 12
    step_s = DECODE.step_s(batch=1, num_context_tokens=context) + OVERHEAD_S + PER_ANSWER_S
    return Single(
        prompt_tokens=prompt_tokens,
        output_tokens=24,
        ttft_s=EDGE_S + OVERHEAD_S + prompt_s,
        handover_s=HANDOVER_S + step_s,
        itl_s=step_s,
    )


def beside(num_answers: int) -> Beside:
    """As that cluster would show it."""
    prompt_s = PREFILL.seconds(num_uncached=1000, num_tokens=1000) + OVERHEAD_S
    step_s = DECODE.step_s(batch=num_answers, num_context_tokens=500 * num_answers) + OVERHEAD_S
    itl_s = step_s + PER_ANSWER_S * num_answers
    return Beside(
        num_answers=num_answers,
        context_tokens=500,
        itl_s=itl_s,
        reading_itl_s=CONTENTION.decode * itl_s,
        prompt_tokens=1000,
        ttft_s=EDGE_S + CONTENTION.prefill * prompt_s,
    )


def requests_of(spec: FleetSpec, rate: float) -> tuple[LiveRequest, ...]:
    workload = draw_arrivals(rate, 20.0, random.Random(3))
    fleet = run_fixed(spec, workload, num_prefill=1, num_decode=1)
    found = []
    for each in fleet.requests:
        assert each.ttft_s is not None
        assert each.tpot_s is not None
        found.append(
            LiveRequest(
                arrival_s=each.arrival.arrival_s,
                prompt_tokens=each.arrival.prompt_tokens,
                output_tokens=each.arrival.output_tokens,
                ttft_s=each.ttft_s,
                itl_s=each.tpot_s,
            )
        )
    return tuple(found)


def make_record() -> LiveRecord:
    """Singles by the costs above; loads by the simulator itself."""
    empty = LiveRecord(
        machine="- CPU: made up",
        prefill=PREFILL,
        decode=DECODE,
        singles=tuple(single(each) for each in (64, 256, 1024)),
        besides=tuple(beside(each) for each in (1, 2, 4)),
        loads=(),
    )
    spec = fit_spec(empty)
    loads = tuple(LiveLoad(rate=rate, requests=requests_of(spec, rate)) for rate in (4.0, 12.0))
    return replace(empty, loads=loads)


def test_what_a_single_request_takes_is_split_into_its_parts() -> None:
    spec = fit_spec(make_record())
    assert spec.edge_s == pytest.approx(EDGE_S)
    assert spec.handover_s == pytest.approx(HANDOVER_S)
    assert spec.prefill.overhead_s == pytest.approx(OVERHEAD_S)
    (regime,) = spec.prefill.decode
    assert regime.cost.per_request_s == pytest.approx(DECODE.per_request_s + PER_ANSWER_S)
    assert spec.contention is not None
    assert spec.contention.prefill == pytest.approx(CONTENTION.prefill)
    assert spec.contention.decode == pytest.approx(CONTENTION.decode)


def test_parts_that_take_longer_than_the_whole_leave_nothing_over() -> None:
    record = make_record()
    slow = replace(record, decode=replace(DECODE, base_s=1.0), prefill=replace(PREFILL, base_s=1.0))
    spec = fit_spec(slow)
    assert (spec.edge_s, spec.handover_s, spec.prefill.overhead_s) == (0.0, 0.0, 0.0)


def test_loads_that_went_as_simulated_hold() -> None:
    points = compare_loads(make_record())
    assert all(each.holds for each in points)
    assert [each.simulated_ttft_s for each in points] == pytest.approx(
        [each.ttft_s for each in points]
    )
    assert points[0].ttft_s < points[1].ttft_s, "the higher load queues"
    assert format_points(points).count("| yes |") == 2


@pytest.mark.parametrize(
    ("ttft_factor", "itl_factor", "holds"),
    [
        pytest.param(1.15, 0.9, True, id="near"),
        pytest.param(1.3, 1.0, False, id="ttft-was-longer"),
        pytest.param(1.0, 0.7, False, id="itl-was-shorter"),
    ],
)
def test_loads_that_went_otherwise(ttft_factor: float, itl_factor: float, holds: bool) -> None:
    record = make_record()
    loads = tuple(
        replace(
            load,
            requests=tuple(
                replace(each, ttft_s=ttft_factor * each.ttft_s, itl_s=itl_factor * each.itl_s)
                for each in load.requests
            ),
        )
        for load in record.loads
    )
    assert [each.holds for each in compare_loads(replace(record, loads=loads))] == [holds] * 2


def test_the_verdict_on_live_loads(tmp_path: Path) -> None:
    path = tmp_path / "live.json"
    assert not check_live(path).holds, "what was not measured does not hold"
    record = make_record()
    write_record(record, path)
    assert check_live(path).holds
    write_record(replace(record, prefill=replace(PREFILL, per_token_s=2e-4)), path)
    assert not check_live(path).holds


def test_a_record_comes_back_from_its_file(tmp_path: Path) -> None:
    record = make_record()
    write_record(record, tmp_path / "new" / "live.json")
    assert read_record(tmp_path / "new" / "live.json") == record


@pytest.mark.parametrize("text", ["", "{}", '{"machine": 3}', "[]"])
def test_another_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(LiveRecordError, match=r"other\.json"):
        read_record(path)


def test_a_record_without_loads_is_refused(tmp_path: Path) -> None:
    write_record(replace(make_record(), loads=()), tmp_path / "live.json")
    with pytest.raises(LiveRecordError, match="nothing was measured"):
        read_record(tmp_path / "live.json")


METRICS = """\
# TYPE pdserve_cost_seconds gauge
pdserve_cost_seconds{pool="prefill",term="prompt"} 0.003
pdserve_cost_seconds{pool="prefill",term="prompt_token"} 4e-05
pdserve_cost_seconds{pool="prefill",term="prompt_token_squared"} 2e-09
pdserve_cost_seconds{pool="prefill",term="step"} 9.0
pdserve_cost_seconds{pool="decode",term="prompt"} 9.0
pdserve_cost_seconds{pool="decode",term="step"} 0.0015
pdserve_cost_seconds{pool="decode",term="request"} 0.0003
pdserve_cost_seconds{pool="decode",term="context_token"} 1e-07
"""


def test_costs_are_read_from_the_routers_metrics() -> None:
    assert read_costs(METRICS) == (PREFILL, DECODE)


def test_metrics_without_a_cost_are_no_measurement() -> None:
    with pytest.raises(LoadError, match="context_token"):
        read_costs(METRICS.replace('term="context_token"', 'term="other"'))


def test_arrivals_come_at_their_rate() -> None:
    arrivals = draw_arrivals(50.0, 20.0, random.Random(0))
    assert len(arrivals) == pytest.approx(1000, rel=0.1)
    assert all(PROMPT_TOKENS[0] <= each.prompt_tokens <= PROMPT_TOKENS[1] for each in arrivals)
    assert len(draw_arrivals(1e-6, 1.0, random.Random(0))) == 1


def trace(start_s: float, *arrivals_s: float) -> RequestTrace:
    return RequestTrace(
        start_s=start_s, token_arrivals_s=arrivals_s, num_output_tokens=len(arrivals_s)
    )


def test_single_requests_are_told_apart_by_token() -> None:
    traces = [trace(0.0, 1.0, 1.5, 1.6, 1.7), trace(0.0, 1.2, 1.9, 2.0, 2.1)]
    found = summarise_single(64, traces)
    assert (found.ttft_s, found.handover_s) == pytest.approx((1.1, 0.6))
    assert found.itl_s == pytest.approx(0.1)


def test_what_answers_take_while_a_prompt_is_read_follows_from_their_tokens() -> None:
    alone = trace(0.0, *(0.1 + 0.01 * number for number in range(11)))
    # 0.05 s without a prompt are five tokens, so 0.1 s with one are the other five.
    company = trace(0.0, 0.1, *(0.12 + 0.013 * number for number in range(9)), 0.25)
    found = summarise_beside([[alone]], [([company], [trace(0.11, 0.21)])])
    assert found.num_answers == 1
    assert found.itl_s == pytest.approx(0.01)
    assert found.reading_itl_s == pytest.approx(0.02)
    assert found.ttft_s == pytest.approx(0.1)


def test_a_load_is_in_order_of_arrival_since_its_start() -> None:
    arrivals = [Arrival(0.0, 100, 3), Arrival(0.1, 200, 3)]
    load = summarise_load(
        2.0, arrivals, [trace(10.3, 11.0, 11.1, 11.4), trace(10.2, 10.5, 10.6, 10.8)], start_s=10.0
    )
    assert [each.prompt_tokens for each in load.requests] == [200, 100]
    assert [each.arrival_s for each in load.requests] == pytest.approx([0.2, 0.3])
    assert [each.itl_s for each in load.requests] == pytest.approx([0.15, 0.2])


class WaitingServer:
    """Answers nobody before so many have asked; each answer has as many tokens as were asked for,
    or `num_tokens`."""

    def __init__(self, num_requests: int, num_tokens: int | None = None) -> None:
        self.prompt_lengths: list[int] = []
        self._everybody = asyncio.Barrier(num_requests)
        self._num_tokens = num_tokens

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        size = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
        asked = json.loads(await reader.readexactly(size))
        self.prompt_lengths.append(len(asked["prompt"]))
        await self._everybody.wait()
        num_tokens = self._num_tokens or asked["max_tokens"]
        events = [{"choices": [{"text": "a"}]}] * num_tokens
        usage = {"choices": [], "usage": {"completion_tokens": num_tokens}}
        texts = [*(json.dumps(each) for each in (*events, usage)), "[DONE]"]
        body = "".join(f"data: {text}\n\n" for text in texts).encode()
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()


async def put_on(
    server: WaitingServer, arrivals: list[Arrival]
) -> tuple[list[RequestTrace], float]:
    async with await asyncio.start_server(server.answer, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        async with asyncio.timeout(60):
            url = f"http://127.0.0.1:{port}/v1"
            return await run_open_loop(url, arrivals, random.Random(0))


async def test_an_open_loop_waits_for_no_answer() -> None:
    server = WaitingServer(3)
    arrivals = [Arrival(0.01 * number, 10 + number, 4) for number in range(3)]
    traces, start_s = await put_on(server, arrivals)
    assert sorted(server.prompt_lengths) == [10, 11, 12]
    assert [trace.num_output_tokens for trace in traces] == [4, 4, 4]
    for trace, arrival in zip(traces, arrivals, strict=True):
        assert trace.start_s >= start_s + arrival.arrival_s


async def test_an_answer_of_another_length_is_no_measurement() -> None:
    with pytest.raises(LoadError, match="2 tokens came, not 4"):
        await put_on(WaitingServer(1, num_tokens=2), [Arrival(0.0, 10, 4)])
