"""Engines in bfloat16 on a processor with AMX: with the permission to use it, and without."""

import subprocess
import sys

import pytest
import torch

HAS_AMX = torch.cpu._is_amx_tile_supported()
needs_amx = pytest.mark.skipif(not HAS_AMX, reason="this processor has no AMX")

ENGINE = """\
import asyncio, sys
sys.path[:0] = {path!r}
from asking_worker import AskingWorker
from refuse_amx import refuse_amx
from engine.arguments import engine_args
from engine.host import EngineHost
from engine.models import resolve_model

OPTIONS = {{
    "worker_cls": "asking_worker.AskingWorker",
    "dtype": "bfloat16",
    "block_size": 32,
    "max_model_len": 256,
    "kv_cache_memory_bytes": 2**26,
}}

async def main():
    # Starting includes answering.
    host = await EngineHost.start(engine_args(resolve_model("demo"), OPTIONS))
    for name in ("may_use_amx", "takes_amx_kernels"):
        print(name, await host.core.collective_rpc_async(name))
    host.stop()

if __name__ == "__main__":
    if {refused!r}:
        refuse_amx()
    asyncio.run(main())
"""


def run_engine(*, refused: bool) -> str:
    """Starts an engine in a process of its own; returns all output."""
    code = ENGINE.format(path=sys.path, refused=refused)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@needs_amx
def test_an_engine_asks_for_amx_and_gets_it() -> None:
    output = run_engine(refused=False)
    assert "may_use_amx [True]" in output
    assert "takes_amx_kernels [True]" in output


@needs_amx
def test_where_amx_is_refused_the_engine_takes_other_kernels_and_says_so() -> None:
    output = run_engine(refused=True)
    assert "may_use_amx [False]" in output
    assert "takes_amx_kernels [False]" in output
    assert "the operating system does not let us use it" in output


@pytest.mark.skipif(HAS_AMX, reason="this processor has AMX")
def test_without_amx_an_engine_answers_in_bfloat16() -> None:
    assert "takes_amx_kernels [False]" in run_engine(refused=False)
