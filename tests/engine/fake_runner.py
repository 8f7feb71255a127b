"""A model runner without a model: it knows what the scheduler tells it, and what it has sampled.

Its KV cache remembers of which tokens each slot was computed. Whoever reads a slot that holds
anything else fails: blocks that were given away too early, or not computed, are found there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.outputs import DraftTokenIds, KVConnectorOutput, ModelRunnerOutput

from engine.output_tokens import output_tokens

Slot = tuple[int, int]
"""A block and the place in it."""


def token_at(position: int) -> int:
    """What the model says after so many tokens, whatever they are."""
    return 100 + position % 500


@dataclass
class _State:
    tokens: list[int]
    blocks: list[int]
    drafts: list[int] = field(default_factory=list)
    chain: list[int] = field(default_factory=list)

    def hashes(self, tokens: Sequence[int]) -> list[int]:
        """Of each of these tokens with all before it; of those that stay, kept."""
        for token in self.tokens[len(self.chain) :]:
            self.chain.append(hash((self.chain[-1] if self.chain else 0, token)))
        found = list(self.chain)
        for token in tokens[len(found) :]:
            found.append(hash((found[-1] if found else 0, token)))
        return found


@dataclass(frozen=True)
class Pass:
    """A step that is computed and not sampled yet."""

    scheduled: SchedulerOutput
    drafts: dict[str, list[int]]
    """Of each request that samples."""
    kv: KVConnectorOutput | None


class FakeRunner:
    """Owns the requests' states, as far as a model runner of that version has them, and the KV."""

    def __init__(self, *, is_v2: bool, block_size: int, num_drafts: int) -> None:
        self.slots: dict[Slot, int] = {}
        self.computed: set[str] = set()
        """Ids of all requests of which it ever was to compute something."""
        self.transfers: Callable[[Any], KVConnectorOutput | None] = lambda _: None
        """Takes the connector's orders for a step."""
        self._is_v2 = is_v2
        self._block_size = block_size
        self._num_drafts = num_drafts
        self._states: dict[str, _State] = {}
        self._drafted: list[str] = []

    def execute(self, scheduled: SchedulerOutput) -> Pass:
        for request_id in scheduled.finished_req_ids:
            self._states.pop(request_id, None)
        starts = self._take_in(scheduled)
        self.computed |= starts.keys()
        drafts = {}
        for request_id, num_tokens in scheduled.num_scheduled_tokens.items():
            state = self._states[request_id]
            checked = scheduled.scheduled_spec_decode_tokens.get(request_id, [])
            draft = state.drafts[: len(checked)] if -1 in checked else list(checked)
            draft += [0] * (len(checked) - len(draft))
            start = starts[request_id]
            num_known = num_tokens - len(draft)
            if draft or self._num_drafts:
                # Scheduled before it was known how many of the last drafts are accepted.
                start = min(start, len(state.tokens) - num_known)
            assert start + num_known <= len(state.tokens), "a token that nobody has sampled"
            self._compute(state, start, [*state.tokens[start : start + num_known], *draft])
            if start + num_known == len(state.tokens):
                drafts[request_id] = draft
        return Pass(scheduled, drafts, self.transfers(scheduled.kv_connector_metadata))

    def _take_in(self, scheduled: SchedulerOutput) -> dict[str, int]:
        """Where the step begins in each request."""
        starts = {}
        for new in scheduled.scheduled_new_reqs:
            params = new.sampling_params
            assert isinstance(params, SamplingParams)
            if self._is_v2:
                tokens = list(new.prefill_token_ids or ())
            else:
                tokens = [*(new.prompt_token_ids or ()), *output_tokens(params)]
            self._states[new.req_id] = _State(tokens, list(new.block_ids[0]))
            starts[new.req_id] = new.num_computed_tokens
        cached = scheduled.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            state = self._states[request_id]
            blocks = cached.new_block_ids[index]
            if request_id in cached.resumed_req_ids:
                assert not self._is_v2, "the second runner takes these as new ones"
                assert blocks is not None
                tokens = list(cached.all_token_ids[request_id])
                self._states[request_id] = _State(tokens, list(blocks[0]))
            elif blocks is not None:
                state.blocks += blocks[0]
            starts[request_id] = cached.num_computed_tokens[index]
        return starts

    def _compute(self, state: _State, start: int, inputs: Sequence[int]) -> None:
        hashes = state.hashes([*state.tokens[:start], *inputs])
        for position in range(start):
            found = self.slots.get(self._slot(state, position))
            assert found == hashes[position], f"the KV of token {position} is another's"
        tokens = [*state.tokens[:start], *inputs]
        if tokens != state.tokens[: len(tokens)]:
            # Drafts follow: their hashes are not those that stay.
            fresh = _State(tokens, state.blocks)
            hashes = fresh.hashes(tokens)
        for position in range(start, len(tokens)):
            self.slots[self._slot(state, position)] = hashes[position]

    def _slot(self, state: _State, position: int) -> Slot:
        return state.blocks[position // self._block_size], position % self._block_size

    def sample(self, computed: Pass, grammar: GrammarOutput | None) -> ModelRunnerOutput:
        allowed = _allowed(computed.scheduled, grammar)
        ids = list(computed.scheduled.num_scheduled_tokens)
        sampled: list[list[int]] = []
        self._drafted = []
        for request_id in ids:
            if request_id not in computed.drafts:
                sampled.append([])
                continue
            state = self._states[request_id]
            draft, rows = computed.drafts[request_id], allowed.get(request_id)
            if rows is not None:
                # By now it may have been cut to what the grammar allows.
                checked = computed.scheduled.scheduled_spec_decode_tokens.get(request_id, [])
                draft = [token for token in checked if token != -1]
            tokens = _accepted(len(state.tokens), draft, rows)
            state.tokens += tokens
            state.drafts = self._draft(len(state.tokens))
            self._drafted.append(request_id)
            sampled.append(tokens)
        return ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={each: index for index, each in enumerate(ids)},
            sampled_token_ids=sampled,
            kv_connector_output=computed.kv,
        )

    def _draft(self, position: int) -> list[int]:
        """Right but for every third token."""
        positions = range(position, position + self._num_drafts)
        return [token_at(each) if each % 3 else 99 for each in positions]

    def copy_from(self, other: "FakeRunner", blocks: Sequence[int], remote: Sequence[int]) -> None:
        """Reads another engine's blocks into its own."""
        for block, theirs in zip(blocks, remote, strict=True):
            for place in range(self._block_size):
                self.slots.pop((block, place), None)
                if (theirs, place) in other.slots:
                    self.slots[block, place] = other.slots[theirs, place]

    def take_drafts(self) -> DraftTokenIds:
        ids = [each for each in self._drafted if each in self._states]
        return DraftTokenIds(ids, [list(self._states[each].drafts) for each in ids])


def _accepted(position: int, draft: Sequence[int], rows: list[list[int]] | None) -> list[int]:
    """The tokens from `position` on: as many of a draft as are right, and one more."""
    tokens: list[int] = []
    for index in range(len(draft) + 1):
        token = token_at(position + index)
        if rows is not None:
            token = rows[index][(position + index) % len(rows[index])]
        tokens.append(token)
        if index == len(draft) or draft[index] != token:
            break
    return tokens


def _allowed(
    scheduled: SchedulerOutput, grammar: GrammarOutput | None
) -> dict[str, list[list[int]]]:
    """Of each request with a grammar: the tokens it allows, for each that may be sampled."""
    if grammar is None:
        return {}
    found, row = {}, 0
    for request_id in grammar.structured_output_request_ids:
        num_rows = 1 + len(scheduled.scheduled_spec_decode_tokens.get(request_id, ()))
        masks = torch.from_numpy(grammar.grammar_bitmask[row : row + num_rows].copy())
        found[request_id] = [_bits(mask) for mask in masks]
        row += num_rows
    return found


def _bits(mask: torch.Tensor) -> list[int]:
    words = mask.tolist()
    return [32 * at + bit for at, word in enumerate(words) for bit in range(32) if word >> bit & 1]
