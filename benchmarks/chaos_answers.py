"""Answers that can be compared: with the undisturbed one, token by token.

Owns what two equal answers have in common, whether they came in pieces or whole. Pure.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LOGPROB_TOLERANCE = 1e-2
"""Logprobs, alone of all, may differ: the same token computed in another batch has other digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One of a request's answers, complete or as far as it came."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str | None
    stop_reason: int | str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came for a request; `completion_tokens` is the server's own count."""

    choices: tuple[Choice, ...]
    completion_tokens: int | None


@dataclass(slots=True)
class _Draft:
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class AnswerBuilder:
    """Owns an answer that is still coming; fed with a stream's chunks or with a whole answer."""

    def __init__(self) -> None:
        self._drafts: dict[int, _Draft] = {}
        self._completion_tokens: int | None = None

    def add(self, chunk: Mapping[str, Any]) -> tuple[int, ...]:
        """Takes a chunk; returns the indices of the choices for which it brought tokens."""
        advanced = []
        for choice in chunk["choices"]:
            draft = self._drafts.setdefault(choice["index"], _Draft())
            draft.text.append(_text(choice))
            token_ids = choice.get("token_ids") or ()
            draft.token_ids += token_ids
            draft.logprobs += _logprobs(choice)
            draft.finish_reason = choice.get("finish_reason") or draft.finish_reason
            if choice.get("stop_reason") is not None:
                draft.stop_reason = choice["stop_reason"]
            if token_ids:
                advanced.append(choice["index"])
        if chunk.get("usage"):
            self._completion_tokens = int(chunk["usage"]["completion_tokens"])
        return tuple(advanced)

    def answer(self) -> Answer:
        """What has come so far."""
        return Answer(
            choices=tuple(
                Choice(
                    text="".join(draft.text),
                    token_ids=tuple(draft.token_ids),
                    logprobs=tuple(draft.logprobs),
                    finish_reason=draft.finish_reason,
                    stop_reason=draft.stop_reason,
                )
                for _, draft in sorted(self._drafts.items())
            ),
            completion_tokens=self._completion_tokens,
        )


def differences(expected: Answer, actual: Answer) -> list[str]:
    """How an answer differs from the undisturbed one, one line each; empty if it does not."""
    if len(actual.choices) != len(expected.choices):
        return [f"{len(actual.choices)} choices, not {len(expected.choices)}"]
    lines = [
        f"choice {index}: {line}"
        for index, (one, other) in enumerate(zip(expected.choices, actual.choices, strict=True))
        for line in _choice_differences(one, other)
    ]
    if actual.completion_tokens != expected.completion_tokens:
        lines.append(f"usage: {actual.completion_tokens} tokens, not {expected.completion_tokens}")
    return lines


def _choice_differences(expected: Choice, actual: Choice) -> list[str]:
    lines = []
    if actual.token_ids != expected.token_ids:
        lines.append(_first_difference(expected.token_ids, actual.token_ids))
    if actual.text != expected.text:
        lines.append(f"the text differs {_from_where(expected.text, actual.text)}")
    for name in ("finish_reason", "stop_reason"):
        one, other = getattr(expected, name), getattr(actual, name)
        if one != other:
            lines.append(f"{name} is {other!r}, not {one!r}")
    if not _close(expected.logprobs, actual.logprobs):
        lines.append("the logprobs differ")
    return lines


def _first_difference(expected: Sequence[int], actual: Sequence[int]) -> str:
    at = _common_length(expected, actual)
    if at == min(len(expected), len(actual)):
        return f"{len(actual)} tokens, not {len(expected)}; the same as far as they go"
    return (
        f"token {at} is {actual[at]}, not {expected[at]}"
        f" ({len(actual)} tokens, {len(expected)} expected)"
    )


def _from_where(expected: str, actual: str) -> str:
    at = _common_length(expected, actual)
    return f"from character {at}: {actual[at : at + 20]!r}, not {expected[at : at + 20]!r}"


def _common_length(one: Sequence[object], other: Sequence[object]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))


def _close(expected: Sequence[float], actual: Sequence[float]) -> bool:
    return len(expected) == len(actual) and all(
        # The equality is for infinities: a token that grammar or bias forbids.
        one == other or math.isclose(one, other, rel_tol=0, abs_tol=LOGPROB_TOLERANCE)
        for one, other in zip(expected, actual, strict=True)
    )


def _text(choice: Mapping[str, Any]) -> str:
    """A completion's text, or a chat's content or tool call, of a chunk or of a whole answer."""
    if "text" in choice:
        return str(choice["text"] or "")
    message = choice.get("delta") or choice.get("message") or {}
    calls = message.get("tool_calls") or ()
    arguments = "".join(call["function"].get("arguments") or "" for call in calls)
    return str(message.get("content") or "") + arguments


def _logprobs(choice: Mapping[str, Any]) -> list[float]:
    """The logprobs of the chosen tokens; an answer that has none yields none."""
    logprobs = choice.get("logprobs") or {}
    if "content" in logprobs:
        return [float(each["logprob"]) for each in logprobs["content"] or ()]
    return [float(each) for each in logprobs.get("token_logprobs") or ()]
