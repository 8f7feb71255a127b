"""A request's state: what its steps change, and what those who watch are told."""

import ast
import asyncio
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_replicas import request

import router.request
from router.phases import RequestPhase
from router.request import PhaseChange, RequestState, TokensOut
from router.routes import Route, RoutePlan

PREFILL_FIRST = RoutePlan(route=Route.PREFILL_FIRST, reason="default")
DECODE_ONLY = RoutePlan(route=Route.DECODE_ONLY, reason="prompt_logprobs")
SOME: Any = object()
"""A replica of which nothing is asked."""
MAY_CHANGE = ("self", "output")


def sent(plan: RoutePlan = PREFILL_FIRST) -> RequestState:
    state = RequestState(request=request(), received_s=10.0)
    state.replan(plan)
    state.begin_attempt(plan, num_predicted_cached=0)
    return state


def test_phases_follow_the_engines_that_have_it() -> None:
    state = sent()
    assert state.sent_to_prefill(SOME, 11.0) is not None
    assert (state.phase, state.replica) == (RequestPhase.PREFILLING, SOME)
    state.rerouted()
    assert state.sent_to_prefill(SOME, 12.0) is None, "it is prefilling all along"
    change = state.sent_to_decode(SOME, 15.0)
    assert change == PhaseChange(
        before=RequestPhase.PREFILLING, after=RequestPhase.TRANSFERRING, seconds=4.0
    )
    change = state.enter(RequestPhase.DECODING, 16.0)
    assert (change.after, change.seconds) == (RequestPhase.DECODING, 1.0)


def test_decode_that_has_the_whole_request_waits_for_no_transfer() -> None:
    state = sent(DECODE_ONLY)
    assert state.sent_to_decode(SOME, 11.0).after is RequestPhase.DECODING


def test_a_new_attempt_has_a_new_name_and_a_new_plan_no_engine() -> None:
    state = sent()
    state.sent_to_prefill(SOME, 11.0)
    assert state.engine_request_id == "r"
    state.replan(DECODE_ONLY)
    assert state.prefill is None
    state.begin_attempt(DECODE_ONLY, num_predicted_cached=5)
    assert (state.engine_request_id, state.route) == ("r~2", Route.DECODE_ONLY)


async def test_whatever_comes_next_ends_the_wait() -> None:
    state = sent()
    timer = asyncio.get_running_loop().call_later(1000, print)
    state.wait(timer, 11.0)
    assert (state.phase, state.replica) == (RequestPhase.WAITING, None)
    state.enter(RequestPhase.ENDED, 12.0)
    assert timer.cancelled()
    assert state.waits_until is None


@pytest.mark.parametrize(
    ("plan", "is_moved", "second"),
    [
        pytest.param(PREFILL_FIRST, False, TokensOut(num=1, gap_s=2.0, transfer_s=2.0),
                     id="from-prefill-to-decode"),
        pytest.param(DECODE_ONLY, False, TokensOut(num=1, gap_s=2.0), id="one-engine"),
        pytest.param(PREFILL_FIRST, True, TokensOut(num=1, gap_s=2.0, recovery_s=1.0),
                     id="its-engine-was-lost"),
    ],
)  # fmt: skip
def test_what_is_known_of_tokens_when_they_come(
    plan: RoutePlan, is_moved: bool, second: TokensOut
) -> None:
    state = sent(plan)
    assert state.add_tokens([7], 11.5) == TokensOut(num=1, ttft_s=1.5)
    if is_moved:
        state.failed_over(12.5, is_blameless=False)
        state.failed_over(13.0, is_blameless=False)
    assert state.add_tokens([8], 13.5) == second
    assert state.add_tokens([9, 9], 14.0) == TokensOut(num=2, gap_s=0.5)
    assert state.output_token_ids == [7, 8, 9, 9]
    assert state.writing_s == 2.5


def test_moves_for_another_reason_than_an_engines_end_are_forgotten_with_the_next_token() -> None:
    state = sent()
    state.failed_over(11.0, is_blameless=True)
    state.failed_over(11.0, is_blameless=False)
    state.add_tokens([7], 12.0)
    assert (state.num_blameless_failovers, state.num_failovers) == (0, 1)


def assignments(module: Path) -> Iterator[tuple[str, int]]:
    """Of attributes of others; engines' outputs have some of the same names."""
    for node in ast.walk(ast.parse(module.read_text())):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        for target in targets:
            for each in target.elts if isinstance(target, ast.Tuple) else [target]:
                if isinstance(each, ast.Attribute) and ast.unparse(each.value) not in MAY_CHANGE:
                    yield each.attr, each.lineno


def test_nobody_else_changes_a_request() -> None:
    own, names = Path(router.request.__file__), {field.name for field in fields(RequestState)}
    changed = [
        (module.name, line)
        for module in own.parent.rglob("*.py")
        for name, line in assignments(module)
        if module != own and name in names
    ]
    assert changed == []


async def test_a_prompt_of_embeddings_counts_by_its_length() -> None:
    asked = request()
    asked.prompt_token_ids, asked.prompt_embeds = None, torch.zeros((10, 8))
    assert RequestState(request=asked, output_token_ids=[1]).num_tokens == 11
