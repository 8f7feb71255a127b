"""Which prompts have waited too long to be in time, and go behind those that have not. Pure.

In order of their latest start, prompts that are late already come first. While more comes than can
be read, that makes everyone late: each prompt gets its turn just after its own time has run out.
So what is late gives way to what is not, for a while.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

PUT_BACK_S = 180.0
"""By which the latest start of a late prompt becomes later: about as long as a replica takes to
start, and then the pool to drain. What is due again while the overload lasts makes new prompts late
in its stead. Nothing starves: it happens once (see `put_back`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LastStep:
    """What an engine was busy with last; under an overload, its next step is like it."""

    seconds: float = 0.0
    num_prefill_tokens: int = 0
    is_full: bool = False
    """Whether it had no room for more tokens: then the next ones will be as long."""


def put_back(
    latest_start_ms: int,
    num_tokens: int,
    *,
    num_ahead: int = 0,
    arrival_s: float,
    now_s: float,
    last: LastStep,
) -> int | None:
    """The new latest start of a prompt that would be late if its turn came now; None if it keeps
    its.

    A latest start reckons with the prompt's own prefill. But its first token comes with the end of
    a step, so what goes before it and what else is in that step must fit as well: where prompts
    start at the last moment, all that was left out of the reckoning makes each of them late. Who
    has waited for as long as prompts are put back has been put back, or is patient, and keeps its
    place. So does one that was late before it came: its client has asked to go first, whatever that
    does.

    Args:
        num_ahead: tokens that the engine reads before it gets to this prompt.
    """
    start_s = now_s + _others_s(num_tokens, num_ahead, last)
    is_late = latest_start_ms < 1000 * start_s
    has_been = start_s - arrival_s >= PUT_BACK_S
    if not is_late or has_been or latest_start_ms < 1000 * arrival_s:
        return None
    return latest_start_ms + round(1000 * PUT_BACK_S)


class WaitingPrompt(Protocol):
    """As much of vLLM's requests as this needs."""

    priority: int
    """The latest start."""

    @property
    def arrival_time(self) -> float: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_computed_tokens(self) -> int: ...
    @property
    def num_output_tokens(self) -> int: ...


PromptT = TypeVar("PromptT", bound=WaitingPrompt)


class WaitingQueue(Protocol[PromptT]):
    """As much of vLLM's queues as this needs, in order of priority."""

    def __len__(self) -> int: ...
    def peek_request(self) -> PromptT: ...
    def pop_request(self) -> PromptT: ...
    def add_request(self, request: PromptT) -> None: ...


def put_back_late_prompts(
    waiting: WaitingQueue[PromptT],
    *,
    reading: Iterable[tuple[int, int]],
    num_step_tokens: int,
    now_s: float,
    last: LastStep,
) -> None:
    """Puts back those that the next step may begin and that are late: they come first of all.

    Args:
        reading: of each prompt that is being read, its latest start and what is left of it.
    """
    reading = list(reading)
    in_time, num_in_time = [], 0
    while waiting and num_in_time < num_step_tokens:
        first = waiting.peek_request()
        if first.num_computed_tokens or first.num_output_tokens:
            break
        later_ms = put_back(
            first.priority,
            first.num_tokens,
            num_ahead=num_in_time + sum(num for each, num in reading if each <= first.priority),
            arrival_s=first.arrival_time,
            now_s=now_s,
            last=last,
        )
        waiting.pop_request()
        if later_ms is None:
            in_time.append(first)
            num_in_time += first.num_tokens
        else:
            first.priority = later_ms
            waiting.add_request(first)
    for request in in_time:
        waiting.add_request(request)


def _others_s(num_tokens: int, num_ahead: int, last: LastStep) -> float:
    """Of the whole steps until a prompt has been read, what is not its own."""
    if not last.num_prefill_tokens:
        return 0.0
    if not last.is_full:
        return last.seconds * max(0.0, 1 - num_tokens / last.num_prefill_tokens)
    num_steps = math.ceil((num_ahead + num_tokens) / last.num_prefill_tokens)
    return last.seconds * (num_steps - num_tokens / last.num_prefill_tokens)
