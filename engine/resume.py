"""Requests that bring output tokens with them: an answer goes on in another engine, exactly.

vLLM itself continues a request after preemption with all that its answer has led to so far: a
grammar's state, penalties, the count towards `min_tokens` and `max_tokens`, a seed's generator. But
it has no way to be given such a request. Here the tokens come with its parameters (see
`engine.output_tokens`); the scheduler and the model runner, which live in different processes
where an engine has several ranks, each take them from there. Owns nothing at run time.
"""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus
from vllm.v1.worker import gpu_model_runner

from engine.grammar_backends import Grammars
from engine.lanes import Lanes
from engine.limits import Limits
from engine.outlet import Outlet
from engine.output_tokens import output_tokens
from engine.pacing import sleep_only_if
from engine.pieces import Pieces
from engine.steps import Measuring


class _Resuming:
    """Mixed into vLLM's scheduler. Seen from there, such a request comes back from preemption."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        sleep_only_if(lambda: not self.finished_recving_kv_req_ids)

    def add_request(self: Any, request: Request) -> None:
        if tokens := output_tokens(request.sampling_params):
            request.append_output_token_ids(tokens)
            # As after preemption, what is read again is not counted as the prompt's prefill.
            request.prefill_stats = None
        super().add_request(request)  # type: ignore[misc]

    def _handle_blocked_waiting_request(self: Any, request: Request) -> bool:
        if request.request_id in self.grammar_compile_error_reqs:
            # It ends with the step under way; the next one may be scheduled before that is done.
            return False
        waited_for_grammar = request.status == RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
        if not super()._handle_blocked_waiting_request(request):  # type: ignore[misc]
            return False
        if waited_for_grammar and request.num_output_tokens:
            tokens = list(request.output_token_ids)
            if not self.structured_output_manager.accept_tokens(request, tokens):
                # vLLM ends these with an error of their own.
                self.grammar_compile_error_reqs.add(request.request_id)
                return False
        return True


class _Ours(_Resuming, Outlet, Lanes, Pieces, Limits, Measuring, Grammars):
    """What is mixed into either of vLLM's schedulers."""


class ResumingScheduler(_Ours, Scheduler):  # type: ignore[misc]
    """vLLM's scheduler, for requests with output tokens. It measures its steps, keeps lanes, reads
    prompts in pieces and sends what it puts out."""


class ResumingAsyncScheduler(_Ours, AsyncScheduler):  # type: ignore[misc]
    """vLLM's scheduler for engines that schedule one step ahead."""


def use_resuming_scheduler(config: VllmConfig) -> None:
    """To be called before the engine starts. vLLM loads the class by name, in its own process."""
    is_async = config.scheduler_config.async_scheduling
    cls = ResumingAsyncScheduler if is_async else ResumingScheduler
    config.scheduler_config.scheduler_cls = f"{cls.__module__}.{cls.__qualname__}"


def resume_in_model_runner(vocab_size: int) -> None:
    """To be called in every process that runs the model, before its first request.

    vLLM's second model runner takes the tokens from the scheduler; this is for the first.
    """

    class ResumedRequestState(gpu_model_runner.CachedRequestState):  # type: ignore[misc]
        generator: torch.Generator | None

        def __post_init__(self) -> None:
            super().__post_init__()
            tokens = output_tokens(self.sampling_params)
            self.output_token_ids.extend(tokens)
            if self.generator is None:
                return
            if self.generator.device.type == "cpu":
                self.generator = _CPUGenerator(self.generator.initial_seed(), self.output_token_ids)
            skip_draws(self.generator, len(tokens), vocab_size)

    gpu_model_runner.CachedRequestState = ResumedRequestState


class _CPUGenerator(torch.Generator):
    """A request's generator that vLLM can take back, as it can those of a GPU.

    Where a prompt is read in several steps, vLLM also samples after the first ones, throws that
    away and sets the generator's offset back. On a CPU there is no offset, and torch's error would
    end the engine, with all of its requests.
    """

    def __new__(cls, seed: int, output_token_ids: list[int]) -> "_CPUGenerator":
        # torch's stubs do not know that a generator is made by its __new__.
        return super().__new__(cls, device="cpu")  # type: ignore[call-arg]

    def __init__(self, seed: int, output_token_ids: list[int]) -> None:
        self._output_token_ids = output_token_ids
        self.manual_seed(seed)

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        """Back to where sampling the answer so far has left it; vLLM asks for nothing else."""
        self.manual_seed(self.initial_seed())
        skip_draws(self, len(self._output_token_ids), vocab_size=0)
        return self


def skip_draws(generator: torch.Generator, num_tokens: int, vocab_size: int) -> None:
    """Brings a request's seeded generator to where sampling `num_tokens` tokens has left it.

    The draws are those of vLLM's samplers: on CPU one number a token, elsewhere one a word of the
    vocabulary.
    """
    if generator.device.type == "cpu":
        for _ in range(num_tokens):
            torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long)
        return
    noise = torch.empty(vocab_size, dtype=torch.float32, device=generator.device)
    for _ in range(num_tokens):
        noise.exponential_(generator=generator)
