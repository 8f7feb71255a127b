"""Greedy answers in bfloat16: the same, up to a choice between two tokens that is a tie.

The same step computed in another batch, or once more after a failover, differs in its last digits.
Logits near 20 are 0.125 apart in bfloat16, so the first two may change places; what follows is
another text. A single vLLM server differs from itself in this way, as its batches change.
"""

from typing import Any

from answers import differences

TIE = 0.5
"""The largest distance of two logprobs that is taken for a tie: four steps of such logits. What
leads to them is rounded as well; how far that reaches is a judgement, not a bound."""

GREEDY = {
    "temperature": 0,
    # Logprobs are those before penalties, and would not show which token was the best.
    "repetition_penalty": 1.0,
    "logprobs": True,
    "top_logprobs": 5,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
}
"""What a request must have for its answer to be compared."""


def unlike(expected: dict[str, Any], actual: dict[str, Any]) -> list[str]:
    """How an answer differs from the expected one, one line each; empty up to a tie."""
    lines = differences(_without_logprobs(expected), _without_logprobs(actual))
    if not lines:
        return []
    gap = _gap_where_parted(expected, actual)
    if gap is not None and gap <= TIE:
        return []
    return [f"the first two tokens that differ are {gap} apart", *lines]


def _gap_where_parted(expected: dict[str, Any], actual: dict[str, Any]) -> float | None:
    """How far apart the logprobs of the first two tokens that differ were; None if that is far."""
    ids, others = expected["choices"][0]["token_ids"], actual["choices"][0]["token_ids"]
    pairs = zip(ids, others, strict=False)
    index = next((at for at, (one, other) in enumerate(pairs) if one != other), None)
    if index is None:
        return None  # one goes on where the other ends
    best = expected["choices"][0]["logprobs"]["content"][index]["top_logprobs"]
    logprobs = {each["token"]: float(each["logprob"]) for each in best}
    other = logprobs.get(f"token_id:{others[index]}")
    return None if other is None else abs(logprobs[f"token_id:{ids[index]}"] - other)


def _without_logprobs(answer: dict[str, Any]) -> dict[str, Any]:
    choice = answer["choices"][0]
    return answer | {"choices": [{k: v for k, v in choice.items() if k != "logprobs"}]}
