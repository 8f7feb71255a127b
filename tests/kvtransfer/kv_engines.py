"""Real engine cores for these tests, driven as a replica drives its own."""

import asyncio
import contextlib
import os
import random
import secrets
import signal
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from forked import forked_context

from engine.step_limit import STEP_LIMIT
from kvtransfer.config import kv_transfer_config, transfer_env
from kvtransfer.credentials import Credentials, give_credentials
from kvtransfer.peers import Peers
from kvtransfer.phase import Phase
from kvtransfer.stats import PairDelta, pair_deltas

ENGINE_ENV = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    **transfer_env("127.0.0.1"),
}
TRANSFER_OPTIONS = (
    "lease_s",
    "backends",
    "connector",
    "read_timeout_s",
    "shared_memory",
    "side_channel_port",
)
"""What `running_engines` passes on to `kv_transfer_config`; the rest is vLLM's."""
SECRET = secrets.token_hex()
"""Of all engines of one test run."""
PREFILL_ONLY = {"do_remote_decode": True, "do_remote_prefill": False}


@dataclass
class Answer:
    """What an engine made of one request, so far."""

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    finish_reason: Any = None
    kv_transfer_params: dict[str, Any] | None = None
    prefill_stats: Any = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Engine:
    """One engine core. Owns its client, its answers and the sums of what it reported."""

    def __init__(self, core: Any, engine_id: str) -> None:
        self.core = core
        self.engine_id = engine_id
        self.stats: Any = None
        self.transfers: list[PairDelta] = []
        self.answers: dict[str, Answer] = {}
        self.peers = Peers(
            core, is_idle=lambda: all(a.ended.is_set() for a in self.answers.values())
        )
        self._stepped = asyncio.Event()
        self._reader = asyncio.create_task(self._read())

    async def close(self) -> None:
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        processes = self._processes
        # As a host ends its own. It does not wait for their end; whose port is used again does.
        await asyncio.to_thread(self.core.shutdown, timeout=0)
        for process in processes:
            await asyncio.to_thread(process.join)

    async def kill(self) -> None:
        """As a host that goes away does it; to be closed like every other."""
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        os.kill(self.pid, signal.SIGKILL)
        await asyncio.to_thread(self._processes[0].join)

    @property
    def pid(self) -> int:
        process_id: int = self._processes[0].pid
        return process_id

    @property
    def _processes(self) -> list[Any]:
        return list(self.core.resources.engine_manager.processes)

    @property
    def num_bytes_read(self) -> int:
        return sum(delta.num_bytes for delta in self.transfers)

    async def start(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int = 1,
        kv: dict[str, Any] | None = None,
        step_limit_s: float | None = None,
        **sampling: Any,
    ) -> Answer:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine import EngineCoreRequest

        extra_args = {"kv_transfer_params": kv, STEP_LIMIT: step_limit_s}
        request_id = uuid.uuid4().hex
        params = SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            extra_args={key: value for key, value in extra_args.items() if value is not None},
            output_kind=RequestOutputKind.DELTA,
            **({"ignore_eos": True} | sampling),
        )
        answer = self.answers[request_id] = Answer(request_id)
        await self.core.add_request_async(
            EngineCoreRequest(
                request_id=request_id,
                prompt_token_ids=list(prompt),
                mm_features=None,
                sampling_params=params,
                pooling_params=None,
                arrival_time=time.time(),
                lora_request=None,
                cache_salt=None,
                data_parallel_rank=None,
            )
        )
        return answer

    async def generate(self, prompt: Sequence[int], **how: Any) -> Answer:
        answer = await self.start(prompt, **how)
        await asyncio.wait_for(answer.ended.wait(), 20)
        return answer

    async def until(self, condition: Callable[[Any], bool], within_s: float) -> None:
        """Waits for a step whose stats satisfy the condition."""
        async with asyncio.timeout(within_s):
            while self.stats is None or not condition(self.stats):
                self._stepped.clear()
                await self._stepped.wait()

    async def _read(self) -> None:
        while True:
            outputs = await self.core.get_output_async()
            if outputs.scheduler_stats is not None:
                self.stats = outputs.scheduler_stats
                self.transfers += pair_deltas(self.stats.kv_connector_stats)
                self.peers.stepped(self.stats.kv_connector_stats)
                self._stepped.set()
            for output in outputs.outputs:
                answer = self.answers[output.request_id]
                answer.token_ids += output.new_token_ids
                answer.prefill_stats = output.prefill_stats or answer.prefill_stats
                if output.finish_reason is not None:
                    answer.finish_reason = output.finish_reason
                    answer.kv_transfer_params = output.kv_transfer_params
                    answer.ended.set()


def random_prompt(num_tokens: int, seed: object) -> list[int]:
    """The same for the same arguments."""
    return random.Random(str(seed)).choices(range(4, 700), k=num_tokens)


async def plain(engine: Engine, prompt: list[int], max_tokens: int) -> list[int]:
    """What an engine answers that computes everything itself, and keeps nothing of it."""
    await engine.core.reset_prefix_cache_async()
    answer = await engine.generate(prompt, max_tokens=max_tokens)
    await engine.core.reset_prefix_cache_async()
    return answer.token_ids


async def handed_over(prefill: Engine, decode: Engine, prompt: list[int]) -> list[int]:
    """What a pair answers; fails where decode did not get every block of the prompt."""
    first = await prefill.generate(prompt, kv=dict(PREFILL_ONLY))
    rest = await decode.generate(
        prompt + first.token_ids, max_tokens=5, kv=first.kv_transfer_params
    )
    assert rest.prefill_stats.num_external_cached_tokens == len(prompt)
    return first.token_ids + rest.token_ids


@contextlib.asynccontextmanager
async def running_engines(
    model: str, *roles: Phase | tuple[Phase, dict[str, Any]], **overrides: Any
) -> AsyncIterator[list[Engine]]:
    """Engine cores of these roles, started side by side.

    `overrides` are vLLM's, but for TRANSFER_OPTIONS; a role may bring some that only it has.
    """
    own = [(role, {}) if isinstance(role, str) else role for role in roles]
    os.environ.update(ENGINE_ENV)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.v1.engine.utils.get_mp_context", forked_context)
        engines = await asyncio.gather(
            *(asyncio.to_thread(_start_core, model, role, overrides | more) for role, more in own)
        )
    running = [Engine(core, engine_id) for core, engine_id in engines]
    try:
        yield running
    finally:
        await asyncio.gather(*(engine.close() for engine in running))


def _start_core(model: str, role: Phase, overrides: dict[str, Any]) -> tuple[Any, str]:
    from vllm import AsyncEngineArgs
    from vllm.config import KVTransferConfig
    from vllm.v1.engine.core_client import EngineCoreClient
    from vllm.v1.executor.abstract import Executor

    from engine.resume import use_resuming_scheduler

    engine_id = f"{role}-{uuid.uuid4().hex[:8]}"
    options: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 4096,
        # Room for sixty thousand tokens; several engines run at once.
        "kv_cache_memory_bytes": 2**28,
        "enforce_eager": True,
        "distributed_executor_backend": "engine.executor.InlineExecutor",
        "worker_extension_cls": "kvtransfer.extension.WorkerExtension",
        "lease_s": 30,
        "backends": ["UCX"],
    } | overrides
    transfer = {key: options.pop(key) for key in TRANSFER_OPTIONS if key in options}
    kv = kv_transfer_config(role, engine_id=engine_id, **transfer)
    config = AsyncEngineArgs(
        model=model, kv_transfer_config=KVTransferConfig(**kv), **options
    ).create_engine_config()
    use_resuming_scheduler(config)
    give_credentials(config, Credentials(secret=SECRET))
    core = EngineCoreClient.make_async_mp_client(
        vllm_config=config, executor_class=Executor.get_class(config), log_stats=True
    )
    return core, engine_id
