"""Answers put together and compared."""

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.chaos_answers import Answer, AnswerBuilder, Choice, differences


def built(*chunks: dict[str, Any]) -> Answer:
    builder = AnswerBuilder()
    for chunk in chunks:
        builder.add(chunk)
    return builder.answer()


def completion(index: int = 0, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, **fields}]}


def test_a_stream_is_put_together_by_choice() -> None:
    answer = built(
        completion(1, text="x", token_ids=[7]),
        completion(0, text="a", token_ids=[1], logprobs={"token_logprobs": [-0.5]}),
        completion(0, text="bc", token_ids=[2, 3], logprobs={"token_logprobs": [-1.0, -2.0]}),
        completion(0, text="", token_ids=[], finish_reason="stop", stop_reason="c"),
        completion(1, text="", token_ids=[8], finish_reason="length"),
        {"choices": [], "usage": {"completion_tokens": 5}},
    )

    assert answer == Answer(
        choices=(
            Choice(
                text="abc",
                token_ids=(1, 2, 3),
                logprobs=(-0.5, -1.0, -2.0),
                finish_reason="stop",
                stop_reason="c",
            ),
            Choice(
                text="x", token_ids=(7, 8), logprobs=(), finish_reason="length", stop_reason=None
            ),
        ),
        completion_tokens=5,
    )


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        pytest.param({"delta": {"content": "hello"}}, "hello", id="chat, streamed"),
        pytest.param({"message": {"content": "hello"}}, "hello", id="chat, whole"),
        pytest.param({"delta": {"role": "assistant", "content": None}}, "", id="no content"),
        pytest.param(
            {"delta": {"tool_calls": [{"function": {"arguments": "{}"}}]}}, "{}", id="tool call"
        ),
        pytest.param(
            {"message": {"content": None, "tool_calls": [{"function": {"arguments": "{}"}}]}},
            "{}",
            id="tool call, whole",
        ),
    ],
)
def test_chat(choice: dict[str, Any], text: str) -> None:
    answer = built(
        completion(**choice, logprobs={"content": [{"logprob": -1.5}]}, token_ids=[5]),
        completion(delta={}, logprobs=None),
    )

    assert answer.choices[0].text == text
    assert answer.choices[0].logprobs == (-1.5,)


def test_which_choices_advance() -> None:
    builder = AnswerBuilder()

    assert builder.add(completion(1, text="x", token_ids=[7])) == (1,)
    assert builder.add(completion(0, text="", token_ids=[])) == ()
    assert builder.add({"choices": [], "usage": {"completion_tokens": 1}}) == ()


RIGHT = Choice(
    text="abc",
    token_ids=(1, 2, 3),
    logprobs=(-1.0, float("-inf"), -2.0),
    finish_reason="length",
    stop_reason=None,
)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        pytest.param(RIGHT, [], id="the same"),
        pytest.param(replace(RIGHT, logprobs=(-1.005, float("-inf"), -2.0)), [], id="other digits"),
        pytest.param(
            replace(RIGHT, logprobs=(-1.5, float("-inf"), -2.0)),
            ["the logprobs differ"],
            id="another logprob",
        ),
        pytest.param(replace(RIGHT, logprobs=()), ["the logprobs differ"], id="no logprobs"),
        pytest.param(
            replace(RIGHT, token_ids=(1, 9, 3)),
            ["token 1 is 9, not 2 (3 tokens, 3 expected)"],
            id="another token",
        ),
        pytest.param(
            replace(RIGHT, token_ids=(1, 2)),
            ["2 tokens, not 3; the same as far as they go"],
            id="a token is missing",
        ),
        pytest.param(
            replace(RIGHT, text="abbc"),
            ["the text differs from character 2: 'bc', not 'c'"],
            id="another text",
        ),
        pytest.param(
            replace(RIGHT, finish_reason="abort"),
            ["finish_reason is 'abort', not 'length'"],
            id="another end",
        ),
    ],
)
def test_differences(choice: Choice, expected: list[str]) -> None:
    undisturbed = Answer(choices=(RIGHT,), completion_tokens=3)

    found = differences(undisturbed, replace(undisturbed, choices=(choice,)))

    assert found == [f"choice 0: {line}" for line in expected]


def test_differences_beside_the_choices() -> None:
    undisturbed = Answer(choices=(RIGHT,), completion_tokens=3)

    assert differences(undisturbed, replace(undisturbed, choices=())) == ["0 choices, not 1"]
    assert differences(undisturbed, replace(undisturbed, completion_tokens=4)) == [
        "usage: 4 tokens, not 3"
    ]
