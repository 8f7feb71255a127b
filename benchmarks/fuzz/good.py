"""The good requests: what they ask, what they are answered alone, and how fast.

Owns the cases and the limit that each must keep. Small ones: many fit between the others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.chaos_answers import Answer, differences
from benchmarks.chaos_cases import Case, token_prompt
from benchmarks.chaos_client import Client
from cluster.sections import SloConfig

NUM_ALONE = 5
"""How often each is asked before anything else is sent."""
TIMES_SLOWER = 10

_STREAM = {"stream": True}
_SAMPLED = {"temperature": 1.0, "seed": 42}
_MESSAGES = ({"role": "user", "content": "Where does the river begin?"},)
_CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
_SCHEMA = {"json": _CITY, "disable_any_whitespace": True}

_COMPLETIONS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"prompt": "Once upon a time", "max_tokens": 40, "ignore_eos": True, **_STREAM},
    "greedy-whole": {"prompt": token_prompt(150), "max_tokens": 24, "ignore_eos": True},
    "seed": {"prompt": token_prompt(60), "max_tokens": 32, **_SAMPLED, **_STREAM},
    "n-2-whole": {"prompt": token_prompt(61), "max_tokens": 16, "n": 2, **_SAMPLED},
    "logprobs": {"prompt": token_prompt(62), "max_tokens": 16, "logprobs": 2, **_STREAM},
    "json": {"prompt": "A city:", "max_tokens": 60, "structured_outputs": _SCHEMA},
    "long-prompt": {"prompt": token_prompt(700), "max_tokens": 8, **_STREAM},
    "one-token": {"prompt": token_prompt(63), "max_tokens": 1},
}
_CHAT: Mapping[str, Mapping[str, Any]] = {
    "chat": {"max_tokens": 32, "ignore_eos": True, **_STREAM},
    "chat-whole": {"max_tokens": 24},
}

CASES: tuple[Case, ...] = (
    *(Case(name=name, path="completions", fields=each) for name, each in _COMPLETIONS.items()),
    *(
        Case(name=name, path="chat/completions", fields={"messages": _MESSAGES, **each})
        for name, each in _CHAT.items()
    ),
)


class NotRightError(RuntimeError):
    """The cluster was not even right while it was left alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alone:
    """What a case is answered while nothing else runs, and the seconds that it took each time.

    `promised_s` is how long the cluster's targets let it take beside others.
    """

    answer: Answer
    took_s: tuple[float, ...]
    promised_s: float = 0.0


async def learn(client: Client, case: Case, slo: SloConfig) -> Alone:
    """Asks it a few times.

    Raises:
        NotRightError: no answer, or two.
    """
    outcomes = [await client.ask(case) for _ in range(NUM_ALONE)]
    answers = [outcome.answer for outcome in outcomes if outcome.answer is not None]
    if len(answers) < len(outcomes):
        raise NotRightError(f"{case.name} fails alone: {outcomes[-1].error}")
    for answer in answers:
        if lines := differences(answers[0], answer):
            raise NotRightError(f"{case.name} has two answers: {lines[0]}")
    return Alone(
        answer=answers[0],
        took_s=tuple(each.end_s - each.start_s for each in outcomes),
        promised_s=slo.ttft_s + slo.itl_s * case.fields.get("max_tokens", 0),
    )


def limits_s(alone: Mapping[str, Alone]) -> dict[str, float]:
    """How long each case may take: ten times its median, or what the cluster's targets allow.

    A case of milliseconds is judged by the median of all of them: beside others it waits for a step
    of theirs, however short it is itself. And a cluster that is within its targets does what its
    operator has asked for: it lets others have the rest.
    """
    medians_s = {name: median(each.took_s) for name, each in alone.items()}
    typical_s = median(medians_s.values()) if medians_s else 0.0
    return {
        name: max(TIMES_SLOWER * each_s, TIMES_SLOWER * typical_s, alone[name].promised_s)
        for name, each_s in medians_s.items()
    }
