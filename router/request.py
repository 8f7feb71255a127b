"""One request's life in the router: its phase, its engines, its tokens, its times.

Owns every change of these. What a change was, for those who watch, is what its method returns.
"""

import asyncio
import time
from dataclasses import dataclass, field

import msgspec
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.metrics.stats import PrefillStats

from router.phases import RequestPhase
from router.pool import Replica
from router.prefixes import extend_chain
from router.recovery import Failures
from router.route_note import RouteNote
from router.routes import Route, RoutePlan


class PhaseChange(msgspec.Struct, frozen=True, kw_only=True):
    """A request has entered a phase."""

    before: RequestPhase
    after: RequestPhase
    seconds: float
    """In the one before."""


class TokensOut(msgspec.Struct, frozen=True, kw_only=True):
    """A request's client was given tokens. What does not apply is None."""

    num: int
    ttft_s: float | None = None
    """Of the first ones: from receipt to now."""
    gap_s: float | None = None
    """Of later ones: since those before."""
    transfer_s: float | None = None
    """The same, where these are decode's first and those before came from prefill."""
    recovery_s: float | None = None
    """Since the engine before was lost."""


@dataclass(slots=True, eq=False)
class RequestState:
    """What the router knows of a running request. Only its own methods change it.

    With the request and the tokens so far, it can go on in any engine.
    """

    request: EngineCoreRequest
    note: RouteNote | None = None
    """Of the HTTP request that it answers."""
    num_ahead: int = 0
    """Requests without a first token when it came."""
    plan: RoutePlan | None = None
    """Of what is left, made anew whenever it is routed; None before that."""
    output_token_ids: list[int] = field(default_factory=list)
    """What the client has been given."""
    phase: RequestPhase = RequestPhase.RECEIVED
    prefill: Replica | None = None
    decode: Replica | None = None
    chain: list[int] = field(default_factory=list)
    """Hashes of the blocks of prompt and response so far: see router.prefixes."""
    num_predicted_cached: int = 0
    """Tokens that the engine which prefills was thought to have cached."""
    prefill_stats: PrefillStats | None = None
    """Of the engine that really prefilled."""
    received_s: float = field(default_factory=time.monotonic)
    phase_since_s: float = field(default_factory=time.monotonic)
    waits_until: asyncio.TimerHandle | None = None
    """Ends the wait for a replica."""
    first_token_s: float | None = None
    last_token_s: float | None = None
    attempt: int = 0
    num_acknowledgements: int = 0
    """After which it could have been rerouted: see router.reroute."""
    num_failovers: int = 0
    failures: Failures | None = None
    """Of engines with it, as long as it may have caused them."""
    num_blameless_failovers: int = 0
    """Moves for another reason than an engine's end, since its last token; `num_failovers` has the
    others."""
    num_hangs: int = 0
    """Engines and replicas that have hung with it."""
    num_alone_failures: int = 0
    """Engines that have ended with it and no other request in them."""
    lost_s: float | None = None
    """When it was taken from its last engine, until a token comes from the next."""

    @property
    def request_id(self) -> str:
        return str(self.request.request_id)

    @property
    def engine_request_id(self) -> str:
        """What engines call it: new at each attempt, as one may come back to an engine it knows."""
        return f"{self.request_id}~{self.attempt}" if self.attempt > 1 else self.request_id

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_token_ids)

    @property
    def is_suspect(self) -> bool:
        """Whether it may be what made engines fail."""
        return self.failures is not None and self.failures.makes_suspect

    @property
    def num_tokens(self) -> int:
        """Of prompt and response so far."""
        embeds = self.request.prompt_embeds
        prompt = self.request.prompt_token_ids if embeds is None else embeds
        return len(() if prompt is None else prompt) + self.num_output_tokens

    def blocks(self, block_size: int | None) -> list[int]:
        """The chain, brought up to date; empty where tokens alone do not tell what is cached, or
        it is not known in which blocks."""
        request = self.request
        prompt = request.prompt_token_ids
        if block_size is None or prompt is None or request.mm_features:
            return []
        if (len(self.chain) + 1) * block_size <= self.num_tokens:
            lora = request.lora_request and request.lora_request.lora_name
            tokens = [*prompt, *self.output_token_ids] if self.output_token_ids else prompt
            seed = (request.cache_salt, lora)
            self.chain = extend_chain(self.chain, tokens, block_size, seed=seed)
        return self.chain

    @property
    def route(self) -> Route:
        """Of the plan; it must have been routed."""
        assert self.plan is not None
        return self.plan.route

    @property
    def params(self) -> SamplingParams:
        assert self.request.sampling_params is not None
        return self.request.sampling_params

    @property
    def max_tokens(self) -> int | None:
        limit: int | None = self.params.max_tokens
        return limit

    @property
    def replica(self) -> Replica | None:
        """The replica that works on it now."""
        if self.phase is RequestPhase.WAITING:
            return None
        return self.prefill if self.phase is RequestPhase.PREFILLING else self.decode

    # Its way through the phases.

    def enter(self, phase: RequestPhase, now_s: float) -> PhaseChange:
        """It is in `phase` from now on, and waits for nothing any more."""
        change = PhaseChange(before=self.phase, after=phase, seconds=now_s - self.phase_since_s)
        self.phase, self.phase_since_s = phase, now_s
        if self.waits_until is not None:
            self.waits_until.cancel()
            self.waits_until = None
        return change

    def wait(self, waits_until: asyncio.TimerHandle, now_s: float) -> PhaseChange:
        """It waits for a replica, until the timer ends that."""
        change = self.enter(RequestPhase.WAITING, now_s)
        self.waits_until = waits_until
        return change

    def replan(self, plan: RoutePlan) -> None:
        """What is left of it goes another way, and is in no engine."""
        self.plan = plan
        self.prefill = self.decode = None

    def begin_attempt(self, plan: RoutePlan, *, num_predicted_cached: int) -> None:
        """It is about to be sent, under a new name."""
        self.plan = plan
        self.attempt += 1
        self.num_predicted_cached = num_predicted_cached

    def sent_to_prefill(self, replica: Replica, now_s: float) -> PhaseChange | None:
        """A prefill replica has it; None where another had it before."""
        self.prefill = replica
        if self.phase is RequestPhase.PREFILLING:
            return None
        return self.enter(RequestPhase.PREFILLING, now_s)

    def sent_to_decode(self, replica: Replica, now_s: float) -> PhaseChange:
        """A decode replica has it, and fetches its KV where prefill has computed that."""
        self.decode = replica
        is_transfer = self.prefill is not None
        phase = RequestPhase.TRANSFERRING if is_transfer else RequestPhase.DECODING
        return self.enter(phase, now_s)

    def rerouted(self) -> None:
        """A prefill replica that has not begun with it does not have it any more."""
        self.prefill = None

    def acknowledged(self) -> None:
        """Its replica has said what is ahead of it there."""
        self.num_acknowledgements += 1

    # What engines compute of it.

    def prefilled(self, stats: PrefillStats | None) -> None:
        """A prefill engine is done with it."""
        self.prefill_stats = stats

    def observed_cached(self) -> None:
        """How much of the prompt was cached is known now."""
        self.num_predicted_cached = 0

    def add_tokens(self, tokens: list[int], now_s: float) -> TokensOut:
        """Its client is given tokens, one at least."""
        ttft_s = gap_s = transfer_s = recovery_s = None
        if self.last_token_s is None:
            ttft_s = now_s - self.received_s
            self.first_token_s = now_s
        else:
            gap_s = now_s - self.last_token_s
            if self.num_output_tokens == 1 and self._comes_from_prefill:
                transfer_s = gap_s
        if self.lost_s is not None:
            recovery_s = now_s - self.lost_s
            self.lost_s = None
        self.last_token_s = now_s
        self.output_token_ids += tokens
        self.num_blameless_failovers = 0
        return TokensOut(
            num=len(tokens),
            ttft_s=ttft_s,
            gap_s=gap_s,
            transfer_s=transfer_s,
            recovery_s=recovery_s,
        )

    @property
    def _comes_from_prefill(self) -> bool:
        return self.num_failovers == 0 and self.route is Route.PREFILL_FIRST

    @property
    def writing_s(self) -> float | None:
        """From its first token to its last; None while it has none."""
        if self.first_token_s is None or self.last_token_s is None:
            return None
        return self.last_token_s - self.first_token_s

    # What goes wrong with its engines.

    def failed_alone(self) -> None:
        """An engine has ended with it and no other request in it."""
        self.num_alone_failures += 1

    def hung(self) -> None:
        """An engine or a replica has hung with it."""
        self.num_hangs += 1

    def suspected(self, failures: Failures | None) -> None:
        """What it is under suspicion of now."""
        self.failures = failures

    def cleared(self) -> None:
        """It has shown that it is not what made engines fail."""
        self.failures = None

    def failed_over(self, now_s: float, *, is_blameless: bool) -> None:
        """It has lost its engine, and goes on in another."""
        self.lost_s = self.lost_s or now_s
        if is_blameless:
            self.num_blameless_failovers += 1
        else:
            self.num_failovers += 1
