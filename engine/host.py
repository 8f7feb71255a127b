"""One vLLM engine core: its start, its health, its end.

Owns the `EngineCoreClient` and the processes behind it. Never looks into requests or outputs.
"""

import asyncio
import logging
import re
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from vllm import AsyncEngineArgs
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.engine.core_client import AsyncMPClient, EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor.abstract import Executor

from engine.amx import request_amx
from engine.errors import EngineEnded, EngineStalled
from engine.exit_cause import EngineExit, explain_exit, read_own_output
from engine.guardian import kill_children, start_guardian
from engine.internals import check_internals
from engine.outlet import Inlet
from engine.probe import probe
from engine.resume import use_resuming_scheduler
from kvtransfer.credentials import Credentials, give_credentials

logger = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")

_FAILED_AT_START = re.compile(r"Failed core proc\(s\): \{(?:'\w+': (-?\d+))?")
"""vLLM's words for an engine core that ended while it started, with its exit code if it has one."""


FOLLOWERS_SAY_S = 0.5
"""How long the news of a rank on another node may take: its end brings ours down, often sooner."""
_PAUSE_S = 0.2
"""Between two looks at what an engine that cannot start has started."""


class OtherNodes(Protocol):
    """Where the ranks of an engine are that this process has not started."""

    ended: asyncio.Future[EngineExit]
    """Done where one of them has ended."""

    def stop(self) -> None:
        """Ends them; `ended` is not done by it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What an engine turned out to be once it runs."""

    max_model_len: int
    block_size: int
    num_kv_blocks: int
    max_num_seqs: int
    num_dropped_tokens: int = 0
    """At the end of each prompt that it hands over: see `kvtransfer.nixl`."""
    kv_bytes_per_token: float | None = None
    """In all of its ranks together; None where that is not known."""


class EngineHost:
    """Runs one engine core in processes of its own. Owns them: `stop` or our death ends them.

    Where the engine spans nodes, owns its followers as well: none of its parts outlives another.
    """

    def __init__(self, core: AsyncMPClient, config: VllmConfig, inlet: Inlet) -> None:
        self.core = core
        self.config = config
        self._inlet = inlet
        self._followers: OtherNodes | None = None
        self._num_dropped_tokens = 0
        self._kv_cache_bytes = 0

    @classmethod
    async def start(
        cls,
        args: AsyncEngineArgs,
        *,
        credentials: Credentials | None = None,
        followers: OtherNodes | None = None,
    ) -> "EngineHost":
        """Starts the engine core and waits until it has loaded the model and answered.

        By its `credentials` an engine that moves KV knows its peers. `followers` are those of an
        engine that spans nodes; they have begun, and end with this start where it fails.

        Raises:
            EngineInternalsChanged: this vLLM is not the one we call into.
            EngineEnded: the engine core ended while it started, or by its first answer.
            EngineUnusable: its first answer is not what was asked for.
            ValueError, RuntimeError: vLLM refused the arguments or could not start.
        """
        check_internals()
        start_guardian()
        host = await cls._started(args, credentials, followers)
        try:
            await host._inlet.open(host.core)
            await host._ask_ranks("accept_output_tokens")
            if host.config.kv_transfer_config is not None:
                host._num_dropped_tokens = max(await host._ask_ranks("num_dropped_tokens"))
            host._kv_cache_bytes = sum(await host._ask_ranks("kv_cache_bytes"))
            await probe(host.core, host.config)
        except EngineDeadError:
            how = await host.exit()
            host.stop()
            raise EngineEnded(how) from None
        except BaseException:
            host.stop()
            raise
        return host

    @classmethod
    async def _started(
        cls,
        args: AsyncEngineArgs,
        credentials: Credentials | None,
        followers: OtherNodes | None,
    ) -> "EngineHost":
        # In a thread: it takes many seconds and the caller's event loop has other work.
        starting = asyncio.create_task(asyncio.to_thread(cls._start, args, credentials))
        if followers is None:
            return await starting
        try:
            host = await _unless_others_end(starting, followers)
        except BaseException:
            followers.stop()
            raise
        host._followers = followers
        followers.ended.add_done_callback(lambda _: kill_children())
        return host

    @classmethod
    def _start(cls, args: AsyncEngineArgs, credentials: Credentials | None) -> "EngineHost":
        config = engine_config(args, credentials)
        inlet = Inlet(config)
        try:
            core = EngineCoreClient.make_async_mp_client(
                vllm_config=config, executor_class=Executor.get_class(config), log_stats=True
            )
        except RuntimeError as error:
            inlet.close()
            if failed := _FAILED_AT_START.search(str(error)):
                exit_code = int(failed[1]) if failed[1] else None
                raise EngineEnded(explain_exit(exit_code, read_own_output())) from None
            raise
        except BaseException:
            inlet.close()
            raise
        return cls(core, config, inlet)

    def facts(self) -> EngineFacts:
        cache = self.config.cache_config
        num_tokens = (cache.num_gpu_blocks or 0) * cache.block_size
        return EngineFacts(
            max_model_len=self.config.model_config.max_model_len,
            block_size=cache.block_size,
            num_kv_blocks=cache.num_gpu_blocks or 0,
            max_num_seqs=self.config.scheduler_config.max_num_seqs,
            num_dropped_tokens=self._num_dropped_tokens,
            kv_bytes_per_token=self._kv_cache_bytes / num_tokens if num_tokens else None,
        )

    async def _ask_ranks(self, method: str) -> list[Any]:
        """What each rank's worker answers, before the first request."""
        return await _unless_ended(self.core, self.core.collective_rpc_async(method))

    @property
    def is_dead(self) -> bool:
        return bool(self.core.resources.engine_dead)

    async def exit(self) -> EngineExit:
        """How the engine ended, once it has."""
        if self._followers is not None:
            how = await _first_end(self._followers)
            # They wait for an engine core that is gone.
            self._followers.stop()
            if how is not None:
                return how
        finished = self.core.resources.engine_manager.finished_procs()
        return explain_exit(next(iter(finished.values()), None), read_own_output())

    @contextmanager
    def held(self) -> Iterator[None]:
        """The engine core waits meanwhile, as soon as it has something to put out."""
        self._inlet.hold()
        try:
            yield
        finally:
            self._inlet.let_go()

    async def check(self, timeout_s: float) -> None:
        """Asks the engine core for a sign of life, answered between two steps.

        Raises:
            EngineDeadError: one of its processes has ended.
            EngineStalled: it did not answer within `timeout_s`.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self.core.is_scheduler_paused_async()
        except TimeoutError:
            if self._inlet.is_held:
                return  # It waits for us.
            raise EngineStalled(f"the engine core did not answer for {timeout_s:g} s") from None

    def stop(self) -> None:
        """Ends the engine's processes; whatever is still running in them is lost."""
        if self._followers is not None:
            self._followers.stop()
        self._inlet.close()
        self.core.shutdown(timeout=0)


def engine_config(
    args: AsyncEngineArgs, credentials: Credentials | None, *, is_headless: bool = False
) -> VllmConfig:
    """vLLM's whole configuration of an engine, the same on all nodes that it has."""
    # Here as well as in the ranks: the configuration depends on it.
    request_amx()
    config = args.create_engine_config(headless=is_headless)
    use_resuming_scheduler(config)
    keep_no_images(config)
    if credentials is not None:
        give_credentials(config, credentials)
    parallel = config.parallel_config
    if parallel.nnodes > 1 and current_platform.is_cpu():
        # By a node's devices vLLM knows which ranks it has, and takes all CPUs for one
        # (`MessageQueue.create_from_process_group_single_reader`).
        parallel.assigned_physical_gpu_ids = list(range(parallel.local_world_size))
    return config


async def _unless_others_end(
    starting: asyncio.Task[EngineHost], followers: OtherNodes
) -> EngineHost:
    await asyncio.wait((starting, followers.ended), return_when=asyncio.FIRST_COMPLETED)
    while not starting.done():
        # The ranks here wait for those that are gone, and vLLM for them.
        kill_children()
        await asyncio.wait((starting,), timeout=_PAUSE_S)
    try:
        return starting.result()
    except Exception:
        if (how := await _first_end(followers)) is not None:
            raise EngineEnded(how) from None
        raise


async def _first_end(followers: OtherNodes) -> EngineExit | None:
    """How the first of them ended, if one has; where it was the first it is heard of in moments."""
    await asyncio.wait((followers.ended,), timeout=FOLLOWERS_SAY_S)
    return followers.ended.result() if followers.ended.done() else None


def keep_no_images(config: VllmConfig) -> None:
    """Has an engine keep none of what routers send: they send every image whole, and each time."""
    if (images := config.model_config.multimodal_config) is not None:
        images.mm_processor_cache_gb = 0


async def _unless_ended(core: AsyncMPClient, call: Coroutine[Any, Any, _Answer]) -> _Answer:
    """The answer to a call to an engine that has no request yet.

    vLLM answers no call of an engine that has ended; whoever waits for its next output is told.

    Raises:
        EngineDeadError: it has ended.
    """
    answer, ended = asyncio.create_task(call), asyncio.create_task(core.get_output_async())
    try:
        await asyncio.wait((answer, ended), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            await ended
        return await answer
    finally:
        answer.cancel()
        ended.cancel()
