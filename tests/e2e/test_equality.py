"""The cluster's answers are those of one plain vLLM server."""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

import httpx
import pytest
from answers import CHAT, COMPLETIONS, ask, differences
from cases import SAMPLED, Case, cases, token_prompt
from servers import BLOCK_SIZE, MAX_MODEL_LEN, Server

CASES = list(cases())
STREAMED = [case for case in CASES if case.can_stream]


class Comparison:
    """Sends requests to both servers. Owns nothing but what it needs to reach them."""

    def __init__(self, client: httpx.AsyncClient, cluster: Server, plain: Server) -> None:
        self.client = client
        self.cluster = cluster
        self.plain = plain

    async def check(self, endpoint: str, body: dict[str, Any]) -> dict[str, Any]:
        """Asserts that both answer the same; returns the answer."""
        expected, actual = await asyncio.gather(
            ask(self.client, self.plain.url, endpoint, body),
            ask(self.client, self.cluster.url, endpoint, body),
        )
        assert not (lines := differences(expected, actual)), "\n".join(lines)
        return expected

    async def check_prompts(self, prompts: Iterable[Sequence[int]], **fields: Any) -> None:
        """All at once, each as a request of its own."""
        bodies = (
            Case(name="", endpoint=COMPLETIONS, fields=fields | {"prompt": prompt}).body()
            for prompt in prompts
        )
        await asyncio.gather(*(self.check(COMPLETIONS, body) for body in bodies))


@pytest.fixture
def both(client: httpx.AsyncClient, cluster: Server, plain: Server) -> Comparison:
    return Comparison(client, cluster, plain)


@pytest.mark.parametrize("case", CASES, ids=str)
async def test_whole(both: Comparison, case: Case) -> None:
    await both.check(case.endpoint, case.body())


@pytest.mark.parametrize("case", STREAMED, ids=str)
async def test_streamed(both: Comparison, case: Case) -> None:
    await both.check(case.endpoint, case.body(stream=True))


@pytest.mark.parametrize("endpoint", [COMPLETIONS, CHAT])
async def test_stream_without_usage(both: Comparison, endpoint: str) -> None:
    (case,) = (case for case in CASES if case.endpoint == endpoint and case.name == "greedy")
    body = case.body() | {"stream": True}
    answer = await both.check(endpoint, body)
    assert "usage" not in answer
    every = {"include_usage": True, "continuous_usage_stats": True}
    answer = await both.check(endpoint, body | {"stream_options": every})
    assert answer["usage"]["completion_tokens"] > 0


ANSWER_TOKENS = 12
STOP_PROMPT = "What is the capital of"
"""Its answer's tokens are whole characters and all differ, so that a stop hits where it should."""

STOPS: dict[str, tuple[slice, dict[str, Any]]] = {
    "first-token": (slice(0, 1), {}),
    "second-token": (slice(1, 2), {}),
    "third-token": (slice(2, 3), {}),
    "middle": (slice(6, 7), {}),
    "across-first-and-second": (slice(0, 2), {}),
    "across-three": (slice(4, 7), {}),
    "first-token-kept": (slice(0, 1), {"include_stop_str_in_output": True}),
    "across-kept": (slice(0, 2), {"include_stop_str_in_output": True}),
    "within-min-tokens": (slice(1, 2), {"min_tokens": 4}),
    "after-min-tokens": (slice(6, 7), {"min_tokens": 4}),
    "first-of-one": (slice(0, 1), {"max_tokens": 1}),
    "second-of-two": (slice(1, 2), {"max_tokens": 2}),
    "with-logprobs": (slice(3, 5), {"logprobs": 2}),
    "sampled": (slice(3, 5), SAMPLED),
}
"""Which tokens of a known answer are the stop string, or the stop token ids."""

stops = pytest.mark.parametrize(("tokens", "fields"), STOPS.values(), ids=STOPS)
streamed = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


async def known_answer(both: Comparison, fields: dict[str, Any]) -> dict[str, Any]:
    """An answer without the stop, token by token."""
    free = {"max_tokens": ANSWER_TOKENS, "min_tokens": 0, "logprobs": 0}
    answer = await both.check(COMPLETIONS, stop_case(fields | free, stream=False))
    choice: dict[str, Any] = answer["choices"][0]
    return choice


def is_due(tokens: slice, fields: dict[str, Any]) -> bool:
    """Whether the stop comes late enough to count."""
    return bool(tokens.start >= fields.get("min_tokens", 0))


def stop_case(fields: dict[str, Any], *, stream: bool) -> dict[str, Any]:
    common = {"prompt": STOP_PROMPT, "max_tokens": ANSWER_TOKENS}
    return Case(name="", endpoint=COMPLETIONS, fields=common | fields).body(stream=stream)


@streamed
@stops
async def test_stop_string(
    both: Comparison, tokens: slice, fields: dict[str, Any], stream: bool
) -> None:
    known = await known_answer(both, fields)
    stop = "".join(known["logprobs"]["tokens"][tokens])
    answer = await both.check(COMPLETIONS, stop_case(fields | {"stop": [stop]}, stream=stream))
    if is_due(tokens, fields):
        assert answer["choices"][0]["stop_reason"] == stop


@streamed
@stops
async def test_stop_token(
    both: Comparison, tokens: slice, fields: dict[str, Any], stream: bool
) -> None:
    known = await known_answer(both, fields)
    ids = known["token_ids"][tokens]
    body = stop_case(fields | {"stop_token_ids": ids}, stream=stream)
    answer = await both.check(COMPLETIONS, body)
    if is_due(tokens, fields):
        assert answer["choices"][0]["stop_reason"] in ids


async def test_every_short_prompt(both: Comparison) -> None:
    await both.check_prompts((token_prompt(length) for length in range(1, 25)), max_tokens=4)


@pytest.mark.parametrize("past", [-1, 0, 1])
async def test_around_every_block_boundary(both: Comparison, past: int) -> None:
    lengths = range(BLOCK_SIZE + past, MAX_MODEL_LEN - 3, BLOCK_SIZE)
    await both.check_prompts((token_prompt(length) for length in lengths), max_tokens=4)


@pytest.mark.parametrize("past", [-2, -1, 0])
async def test_answer_ends_around_every_block_boundary(both: Comparison, past: int) -> None:
    """The prompt and the answer together fill whole blocks, or nearly."""
    lengths = range(BLOCK_SIZE + past, MAX_MODEL_LEN - 3, BLOCK_SIZE)
    await both.check_prompts((token_prompt(length, seed=1) for length in lengths), max_tokens=2)


@pytest.mark.parametrize("num_left", [1, 2, 3])
async def test_up_to_the_context_limit(both: Comparison, num_left: int) -> None:
    prompt = token_prompt(MAX_MODEL_LEN - num_left)
    await both.check_prompts([prompt], max_tokens=num_left)
    await both.check_prompts([prompt], max_tokens=None)  # as many as there is room for


@pytest.mark.parametrize("length", [5, BLOCK_SIZE, 3 * BLOCK_SIZE, 3 * BLOCK_SIZE + 1, 500])
async def test_same_prompt_again(both: Comparison, length: int) -> None:
    """From the second time on the prefix caches hit, in every engine."""
    prompt = token_prompt(length, seed=2)
    for fields in ({}, {}, SAMPLED, {"prompt_logprobs": 0}, {"max_tokens": 1}):
        await both.check_prompts([prompt], **{"max_tokens": 6, **fields})
    await both.check_prompts([prompt + token_prompt(10)], max_tokens=2)


async def test_64_at_once(both: Comparison) -> None:
    """The plain server does them one by one, the cluster all at once."""
    # With logprob_token_ids in a batch, vLLM 0.32 spoils the logprobs of the others in it.
    usable = [case for case in CASES if "logprob_token_ids" not in case.fields]
    chosen = [usable[index * len(usable) // 64] for index in range(64)]
    requests = [
        (case.endpoint, case.body(stream=case.can_stream and index % 2 == 0))
        for index, case in enumerate(chosen)
    ]
    expected = [await ask(both.client, both.plain.url, *request) for request in requests]
    actual = await asyncio.gather(
        *(ask(both.client, both.cluster.url, *request) for request in requests)
    )
    for case, one, other in zip(chosen, expected, actual, strict=True):
        assert not (lines := differences(one, other)), f"{case}:\n" + "\n".join(lines)
