"""An engine whose ranks are on two nodes, as its host sees it: two processes of one machine.

The actors of Ray that start such ranks elsewhere are tested with real nodes, in tests/nodes.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import psutil
import pytest
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.exceptions import EngineDeadError

from engine.arguments import engine_args
from engine.errors import EngineEnded
from engine.exit_cause import EngineExit
from engine.guardian import MARK_VARIABLE, marked_pids
from engine.host import EngineHost
from engine.meeting import RANK_ENV, Meeting
from engine.models import resolve_model

HOST = "127.0.0.1"
OPTIONS = {"dtype": "float32", "max_model_len": 256, "kv_cache_memory_bytes": 2**26}
PROMPT = list(range(5, 65))
ENDS_WITHIN_S = 20.0

RUN_RANKS = """
import json, os, sys
from engine.arguments import engine_args
from engine.guardian import MARK_VARIABLE, start_guardian
from engine.models import resolve_model
from engine.ranks import run_ranks

if __name__ == "__main__":
    start_guardian()
    print("mark", os.environ[MARK_VARIABLE], flush=True)
    args = engine_args(resolve_model("demo"), json.loads(sys.argv[1]))
    print("ended", run_ranks(args).text, flush=True)
"""


class Neighbour:
    """The engine's second node: a process that runs its ranks. Owns it."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.ended: asyncio.Future[EngineExit] = asyncio.get_running_loop().create_future()
        self._process = subprocess.Popen(
            [sys.executable, "-c", RUN_RANKS, json.dumps(options)],
            env={**os.environ, "VLLM_HOST_IP": HOST},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self.mark = next(self._words("mark"))
        self._watch = asyncio.create_task(self._wait())

    def _words(self, of: str) -> Iterator[str]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if found := re.match(rf"{of} (.*)", line):
                yield found[1]

    async def _wait(self) -> None:
        text = await asyncio.to_thread(lambda: next(self._words("ended"), "nothing was said"))
        self.ended.set_result(EngineExit(cause="error", text=f"over there, {text}"))

    def rank(self) -> psutil.Process:
        (rank,) = (each for each in map(psutil.Process, marked_pids(self.mark)) if is_rank(each))
        return rank

    def stop(self) -> None:
        self._watch.cancel()
        self._process.kill()

    def close(self) -> None:
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def is_rank(process: psutil.Process) -> bool:
    return "VLLM::Worker" in " ".join(process.cmdline())


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch) -> Meeting:
    for name, value in {**RANK_ENV, "VLLM_HOST_IP": HOST, "GLOO_SOCKET_IFNAME": "lo"}.items():
        monkeypatch.setenv(name, value)
    return Meeting(HOST, 2)


async def answer(host: EngineHost) -> list[int]:
    params = SamplingParams(
        temperature=0.0, max_tokens=12, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    await host.core.add_request_async(
        EngineCoreRequest(
            request_id="r",
            prompt_token_ids=PROMPT,
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
    )
    tokens: list[int] = []
    while True:
        for output in (await host.core.get_output_async()).outputs:
            tokens += output.new_token_ids
            if output.finished:
                return tokens


async def all_outputs(host: EngineHost) -> None:
    while True:
        await host.core.get_output_async()


async def test_life_of_an_engine_that_spans_nodes(meeting: Meeting) -> None:
    """It answers as one of one rank does, and ends with its rank elsewhere, which says how."""
    options = {**OPTIONS, "tensor_parallel_size": 2}
    neighbour = Neighbour({**options, **meeting.options(1)})
    args = engine_args(resolve_model("demo"), options | meeting.options(0))
    host = await EngineHost.start(args, followers=neighbour)
    try:
        spread = await answer(host)
        own = [psutil.Process(pid) for pid in marked_pids(os.environ[MARK_VARIABLE])]
        assert any(map(is_rank, own))
        neighbour.rank().kill()
        with pytest.raises(EngineDeadError):
            await asyncio.wait_for(all_outputs(host), ENDS_WITHIN_S)
        assert "over there, the engine was ended by SIGKILL" in (await host.exit()).text
        _, alive = await asyncio.to_thread(psutil.wait_procs, own, ENDS_WITHIN_S)
        assert not [process for process in alive if is_rank(process)]
    finally:
        host.stop()
        neighbour.close()
    alone = await EngineHost.start(engine_args(resolve_model("demo"), OPTIONS))
    try:
        assert await answer(alone) == spread
    finally:
        alone.stop()


async def test_a_start_ends_when_ranks_elsewhere_do(meeting: Meeting) -> None:
    """The ranks here would wait for them for half an hour."""
    options = {**OPTIONS, "tensor_parallel_size": 2}
    neighbour = Neighbour({**options, **meeting.options(1), "load_format": "none-such"})
    args = engine_args(resolve_model("demo"), options | meeting.options(0))
    try:
        with pytest.raises(EngineEnded, match="over there, "):
            await EngineHost.start(args, followers=neighbour)
        assert not any(map(is_rank, map(psutil.Process, marked_pids(os.environ[MARK_VARIABLE]))))
    finally:
        neighbour.stop()
        neighbour.close()
