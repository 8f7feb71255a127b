"""One very long prompt and many short ones: who gets the first token, in a real engine.

And what answers get meanwhile that are being written there (`engine.pieces`).
"""

import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import pytest_asyncio
from vllm import SamplingParams
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest

from engine.arguments import engine_args
from engine.host import EngineHost
from engine.lanes import Lanes, most_of_one_prompt
from engine.lateness import PUT_BACK_S
from engine.models import resolve_model
from engine.output_tokens import with_output_tokens
from engine.step_limit import LEAST_PIECE, STEP_LIMIT
from engine.steps import StepSample, step_sample

OPTIONS = {
    "max_model_len": 4096,
    "kv_cache_memory_bytes": 2**25,
    "dtype": "float32",
    "block_size": 32,
    "max_num_batched_tokens": 256,
    "scheduling_policy": "priority",
    "enable_prefix_caching": False,
}
LONG = 4000
SHORT = 20
NUM_SHORT = 12


@pytest.mark.parametrize(
    ("urgent", "most"),
    [
        pytest.param([], None, id="nobody-waits"),
        pytest.param([100], 900, id="one-fits"),
        pytest.param([100, 200], 700, id="two-fit"),
        pytest.param([5000], 250, id="longer-than-a-step"),
        pytest.param([100] * 50, 250, id="more-than-a-step"),
    ],
)
def test_room_for_urgent_prompts(urgent: list[int], most: int | None) -> None:
    assert most_of_one_prompt(1000, urgent) == most


def test_waiting_prompts_are_read_only_as_far_as_they_fit() -> None:
    seen: list[int] = []

    def endless() -> Iterator[int]:
        while True:
            seen.append(400)
            yield 400

    assert most_of_one_prompt(1000, endless()) == 250
    assert len(seen) == 2


@dataclass(order=True)
class Waiting:
    """As much of a request that has not begun as the order of prompts looks at."""

    priority: int
    num_tokens: int = field(compare=False)
    arrival_time: float = field(compare=False)
    num_computed_tokens: int = field(default=0, compare=False)
    num_output_tokens: int = field(default=0, compare=False)
    is_prefill_chunk: bool = field(default=False, compare=False)


def test_prompts_are_put_back_that_come_too_late_behind_those_before_them() -> None:
    """Steps of 1000 tokens take a second. The next reads the rest of a prompt and the first that
    waits; what comes with the one after it is late by a tenth of a second."""
    now_s = time.monotonic()
    prompts = [Waiting(round(1000 * (now_s + 1.5)) + place, 400, now_s - 1.0) for place in range(4)]
    waiting = create_request_queue(SchedulingPolicy.PRIORITY)
    for each in prompts:
        waiting.add_request(each)
    reading = Waiting(0, 1500, now_s - 3.0, num_computed_tokens=1000, is_prefill_chunk=True)
    scheduler = SimpleNamespace(
        _sample=SimpleNamespace(seconds=1.0, num_prefill_tokens=1000, num_tokens=1000),
        max_num_scheduled_tokens=1000,
        running=[reading],
        waiting=waiting,
    )
    Lanes._put_back_late_prompts(scheduler)
    put_back = [each for each in prompts if each.priority > 1000 * (now_s + PUT_BACK_S)]
    assert put_back == prompts[1:]
    assert len(waiting) == 4


class Taken:
    """In the place of vLLM's scheduler: what it was given."""

    policy = SchedulingPolicy.PRIORITY

    def __init__(self) -> None:
        self.requests: list[Waiting] = []

    def add_request(self, request: Waiting) -> None:
        self.requests.append(request)


class Scheduler(Lanes, Taken):
    pass


@pytest.mark.parametrize("steps_s", [(3600.0, 0.0), (-3600.0, 0.0), (0.0, 3600.0)])
def test_the_order_of_prompts_is_theirs_whatever_is_done_to_the_time_of_day(
    monkeypatch: pytest.MonkeyPatch, steps_s: tuple[float, float]
) -> None:
    """Three come, one after the other; before each but the first the time of day is set."""
    scheduler, monotonic_s, day_s = Scheduler(), 50.0, 1e9
    monkeypatch.setattr(time, "monotonic", lambda: monotonic_s)
    monkeypatch.setattr(time, "time", lambda: day_s)
    for step_s in (0.0, *steps_s):
        monotonic_s += 1.0
        day_s += 1.0 + step_s
        scheduler.add_request(Waiting(round(1000 * (day_s + 0.5)), 400, day_s))
    assert [each.priority for each in scheduler.requests] == [51500, 52500, 53500]
    assert [each.arrival_time for each in scheduler.requests] == [51.0, 52.0, 53.0]


def test_what_came_at_a_time_yet_to_be_came_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its router asks a second engine for it after the time of day was set back."""
    scheduler = Scheduler()
    monkeypatch.setattr(time, "monotonic", lambda: 50.0)
    monkeypatch.setattr(time, "time", lambda: 1e9)
    scheduler.add_request(Waiting(round(1000 * (1e9 + 3600.0 + 0.5)), 400, 1e9 + 3600.0))
    (taken,) = scheduler.requests
    assert (taken.priority, taken.arrival_time) == (50500, 50.0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host() -> AsyncIterator[EngineHost]:
    host = await EngineHost.start(engine_args(resolve_model("demo"), OPTIONS))
    yield host
    host.stop()


def request(
    request_id: str,
    num_tokens: int,
    priority: int,
    *,
    given: tuple[int, ...] = (),
    first: int = 0,
    num_more: int = 1,
) -> EngineCoreRequest:
    params = SamplingParams(max_tokens=num_more + len(given), temperature=0.0, ignore_eos=True)
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=[3 + (first + index) % 50 for index in range(num_tokens)],
        mm_features=None,
        sampling_params=with_output_tokens(params, given),
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        priority=priority,
    )


def limited(request: EngineCoreRequest, limit_s: float) -> EngineCoreRequest:
    params = request.sampling_params
    params.extra_args = {**(params.extra_args or {}), STEP_LIMIT: limit_s}
    return request


async def answers(host: EngineHost, *requests: EngineCoreRequest) -> list[list[EngineCoreOutput]]:
    """The outputs of each, which the engine is asked in this order."""
    found: dict[str, list[EngineCoreOutput]] = {each.request_id: [] for each in requests}
    for each in requests:
        await host.core.add_request_async(each)
    while not all(outputs and outputs[-1].finished for outputs in found.values()):
        step = await host.core.get_output_async()
        for output in step.outputs:
            found[output.request_id].append(output)
    return list(found.values())


async def order_of_answers(host: EngineHost, *requests: EngineCoreRequest) -> list[str]:
    """In which order they are answered that came in this one."""
    ended: list[str] = []
    for each in requests:
        await host.core.add_request_async(each)
    while len(ended) < len(requests):
        step = await host.core.get_output_async()
        ended += [output.request_id for output in step.outputs if output.finished]
    return ended


@pytest.mark.asyncio(loop_scope="module")
async def test_urgent_prompts_pass_a_long_one_that_is_being_read(host: EngineHost) -> None:
    ended = await order_of_answers(
        host,
        request("long", LONG, priority=9000),
        *(request(f"short-{index}", SHORT, priority=100 + index) for index in range(NUM_SHORT)),
    )
    assert ended[-1] == "long"


@pytest.mark.asyncio(loop_scope="module")
async def test_a_long_prompt_that_is_late_enough_is_not_passed_any_more(host: EngineHost) -> None:
    ended = await order_of_answers(
        host,
        request("late", LONG, priority=0),
        *(request(f"later-{index}", SHORT, priority=100 + index) for index in range(NUM_SHORT)),
    )
    assert ended[0] == "late"


@pytest.mark.asyncio(loop_scope="module")
async def test_requests_that_bring_tokens_are_ordered_too(host: EngineHost) -> None:
    first, second, third = (
        request(name, LONG if name == "long" else SHORT, priority=priority, given=(7, 8))
        for name, priority in (("long", 50), ("urgent", 1), ("patient", 99))
    )
    assert await order_of_answers(host, first, second, third) == ["urgent", "long", "patient"]


@pytest.mark.asyncio(loop_scope="module")
async def test_an_answer_goes_on_exactly_among_others_by_priority(host: EngineHost) -> None:
    (whole,) = await answers(host, request("whole", SHORT, 5, num_more=12))
    tokens = tuple(tokens_of(whole))
    rest, _ = await answers(
        host,
        request("rest", SHORT, 5, given=tokens[:4], num_more=8),
        request("urgent", LONG, 1),
    )
    assert tuple(tokens_of(rest)) == tokens[4:]


NUM_ANSWERS = 3
NEVER_S = 1e-9
"""A limit that no step keeps: so pieces stay as small as they get."""


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("given", [(), (7, 8)], ids=["new", "with-tokens"])
async def test_a_long_prompt_is_read_in_pieces_while_answers_are_written(
    host: EngineHost, given: tuple[int, ...]
) -> None:
    def long(name: str) -> EngineCoreRequest:
        return request(name, LONG - 1000, 5, given=given, num_more=4)

    (expected,) = await answers(host, long("alone"))
    found: dict[str, list[int]] = {f"answer-{index}": [] for index in range(NUM_ANSWERS)}
    found |= {"long": [], "short": []}
    for index in range(NUM_ANSWERS):
        name = f"answer-{index}"
        await host.core.add_request_async(request(name, SHORT, 5, first=index, num_more=500))
    steps: list[StepSample] = []
    ended: list[str] = []
    while not (found["long"] and "long" in ended and "short" in ended):
        step = await host.core.get_output_async()
        before = sum(map(bool, found.values()))
        for output in step.outputs:
            found[output.request_id] += output.new_token_ids
            ended += [output.request_id] if output.finished else []
        if before < NUM_ANSWERS <= sum(map(bool, found.values())):
            await host.core.add_request_async(limited(long("long"), NEVER_S))
            short = request("short", SHORT, 5, given=(7,), num_more=4)
            await host.core.add_request_async(short)
        sample = step.scheduler_stats and step_sample(step.scheduler_stats)
        if sample and found["answer-0"]:
            steps.append(sample)
    await host.core.abort_requests_async([f"answer-{index}" for index in range(NUM_ANSWERS)])
    # What they still wrote until then must not reach who asks the engine next.
    await order_of_answers(host, request("after", SHORT, 5))
    assert found["long"] == tokens_of(expected)
    assert ended.index("short") < ended.index("long")
    reading = [each for each in steps if each.num_prefill_tokens > SHORT * NUM_ANSWERS]
    assert len(reading) >= (LONG - 1000) // LEAST_PIECE
    # The short one has no limit, so it does not wait for a turn.
    assert max(each.num_prefill_tokens for each in reading) <= LEAST_PIECE + SHORT + 1
    assert all(each.num_decodes >= NUM_ANSWERS for each in reading)


def tokens_of(outputs: list[EngineCoreOutput]) -> list[int]:
    return [token for output in outputs for token in output.new_token_ids]
