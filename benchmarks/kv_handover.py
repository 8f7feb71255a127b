"""How long a decode engine waits for KV: from admitting a request to having its blocks.

Owns two real engines, the requests put to them and the command line. `python -m
benchmarks.kv_handover --help` is the command. The time is the decode engine's own: from queueing
the request to scheduling it with its blocks, on one clock. It holds everything that the product
does in between: the read, the check of the lease, and the steps between which the engine looks.
"""

import argparse
import asyncio
import json
import os
import random
import secrets
import sys
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, get_args

import torch
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput, EngineCoreRequest

from benchmarks.compare import positive, say
from benchmarks.kv_transfer_kernel import vm_read
from benchmarks.kv_transfer_memory import Case, new_memory, size_text
from benchmarks.kv_transfer_peer import PeerFailedError, running_peer
from benchmarks.kv_transfer_rounds import seconds_of
from engine.arguments import engine_args
from engine.demo_model import VOCAB_SIZE
from engine.host import EngineHost
from engine.models import resolve_model
from kvtransfer.config import Sharing, kv_transfer_config, transfer_env
from kvtransfer.credentials import Credentials
from kvtransfer.peers import KVPeer, warm_up
from kvtransfer.phase import Phase
from kvtransfer.side_channel import ReservedPort
from kvtransfer.stats import pair_deltas

TARGET_RATIO = 0.5
"""Of the bandwidth of process_vm_readv alone, in the same round."""

_HOST = "127.0.0.1"
_NUM_TOKENS = 4090
# With the demo model's heads of 64 in float32: 2 MiB of each layer's keys and values for each of
# these heads over 4,096 tokens, in whole blocks.
_NUM_KV_HEADS = 4
_MIB_PER_LAYER = 8
_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


class HandoverFailedError(Exception):
    """The pair did not come about, or decode computed what it should have read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """One request's, beside the copy alone."""

    num_bytes: int
    num_descriptors: int
    usable_s: float
    """From decode's admission to blocks usable."""
    read_s: float
    """What of it the read took, as decode's transfer metrics have it."""
    vm_read_s: float
    """process_vm_readv for as many bytes in as many descriptors."""

    @property
    def ratio(self) -> float:
        return self.vm_read_s / self.usable_s


class Engine:
    """One engine that answers one request at a time. Owns its host."""

    def __init__(self, host: EngineHost, engine_id: str) -> None:
        self.host, self.engine_id = host, engine_id
        self.connector_stats: list[Mapping[str, Any]] = []
        """Of the last request."""

    async def answer(
        self, prompt: list[int], kv_transfer_params: Mapping[str, Any]
    ) -> list[EngineCoreOutput]:
        """The outputs for one token after the prompt."""
        params = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            ignore_eos=True,
            extra_args={"kv_transfer_params": dict(kv_transfer_params)},
        )
        self.connector_stats = []
        await self.host.core.add_request_async(
            EngineCoreRequest(
                request_id=uuid.uuid4().hex,
                prompt_token_ids=prompt,
                mm_features=None,
                sampling_params=params,
                pooling_params=None,
                arrival_time=time.time(),
                lora_request=None,
                cache_salt=None,
                data_parallel_rank=None,
            )
        )
        answered: list[EngineCoreOutput] = []
        while not answered or answered[-1].finish_reason is None:
            outputs = await self.host.core.get_output_async()
            answered += outputs.outputs
            if outputs.scheduler_stats and outputs.scheduler_stats.kv_connector_stats:
                self.connector_stats.append(outputs.scheduler_stats.kv_connector_stats)
        return answered


@asynccontextmanager
async def running_pair(
    num_layers: int, shared_memory: Sharing
) -> AsyncIterator[tuple[Engine, Engine]]:
    """A prefill and a decode engine that have shaken hands. Raises HandoverFailedError."""
    os.environ.update(_ENV | transfer_env(_HOST))
    secret = secrets.token_hex()
    with ReservedPort(_HOST) as port:
        hosts = await asyncio.gather(
            _start("prefill", num_layers, port.port, shared_memory, secret),
            _start("decode", num_layers, None, shared_memory, secret),
        )
        prefill, decode = hosts
        try:
            peer = KVPeer(engine_id=prefill.engine_id, host=_HOST, port=port.port, tp_size=1)
            problem = await warm_up(decode.host.core, peer)
            if problem is not None:
                raise HandoverFailedError(problem)
            yield prefill, decode
        finally:
            for engine in hosts:
                engine.host.stop()


async def _start(
    role: Phase, num_layers: int, port: int | None, shared_memory: Sharing, secret: str
) -> Engine:
    engine_id = f"{role}-{uuid.uuid4().hex[:8]}"
    options = {
        "dtype": "float32",
        # Nobody reads the answer: shapes are all that matters.
        "load_format": "dummy",
        "hf_overrides": {
            "num_hidden_layers": num_layers,
            "num_key_value_heads": _NUM_KV_HEADS,
        },
        "kv_transfer_config": kv_transfer_config(
            role,
            engine_id=engine_id,
            lease_s=30,
            backends=["UCX"],
            shared_memory=shared_memory,
            side_channel_port=port,
        ),
    }
    args = engine_args(resolve_model("demo"), options)
    return Engine(await EngineHost.start(args, credentials=Credentials(secret=secret)), engine_id)


async def measure(num_rounds: int, num_mib: int, shared_memory: Sharing) -> list[Handover]:
    """One request's handover a round, and right after it the copy alone.

    Raises HandoverFailedError, PeerFailedError, or OSError where a process may not read another.
    """
    device = torch.device("cpu")
    num_bytes = num_mib << 20
    found: list[Handover] = []
    with running_peer(num_bytes, device, (), with_nixl=False, with_groups=False) as peer:
        memory = new_memory(num_bytes, device, seed=1)
        async with running_pair(num_mib // _MIB_PER_LAYER, shared_memory) as (prefill, decode):
            for number in range(num_rounds + 1):
                handed = await _hand_over(prefill, decode, random.Random(number))
                case = Case(
                    size_bytes=num_bytes,
                    descriptor_bytes=handed.num_bytes // handed.num_descriptors,
                )
                alone = vm_read(case, memory, peer.facts.pid, peer.facts.address)
                if handed.num_bytes != num_bytes:
                    raise HandoverFailedError(
                        f"decode read {handed.num_bytes} bytes and not {num_bytes}"
                    )
                if number == 0:
                    continue  # Every page of both caches is new to the kernel in the first.
                found.append(handed.beside(seconds_of(alone)))
                _say_round(number, found[-1])
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Handed:
    num_bytes: int
    num_descriptors: int
    usable_s: float
    read_s: float

    def beside(self, vm_read_s: float) -> Handover:
        return Handover(**asdict(self), vm_read_s=vm_read_s)


async def _hand_over(prefill: Engine, decode: Engine, rng: random.Random) -> _Handed:
    prompt = rng.choices(range(4, VOCAB_SIZE), k=_NUM_TOKENS)
    first = (await prefill.answer(prompt, {"do_remote_decode": True, "do_remote_prefill": False}))[
        -1
    ]
    if first.kv_transfer_params is None:
        raise HandoverFailedError("prefill kept nothing for decode")
    outputs = await decode.answer(prompt + first.new_token_ids, first.kv_transfer_params)
    events = {event.type: event.timestamp for output in outputs for event in output.events or ()}
    deltas = [delta for stats in decode.connector_stats for delta in pair_deltas(stats)]
    return _Handed(
        num_bytes=sum(delta.num_bytes for delta in deltas),
        num_descriptors=sum(
            count for stats in decode.connector_stats for count in stats["num_descriptors"]
        ),
        usable_s=events[EngineCoreEventType.SCHEDULED] - events[EngineCoreEventType.QUEUED],
        read_s=sum(delta.seconds for delta in deltas),
    )


def _say_round(number: int, handover: Handover) -> None:
    say(
        f"round {number}: {size_text(handover.num_bytes)} in {handover.num_descriptors} descriptors"
        f" usable after {handover.usable_s * 1e3:.1f} ms, of which {handover.read_s * 1e3:.1f} ms"
        f" the read; process_vm_readv alone {handover.vm_read_s * 1e3:.1f} ms:"
        f" {handover.ratio:.2f}"
    )


def _positive_layers(text: str) -> int:
    value = positive(text)
    if value % _MIB_PER_LAYER:
        raise argparse.ArgumentTypeError(f"a multiple of {_MIB_PER_LAYER}")
    return value


def main() -> int:
    """The command line. Its last line is JSON; the exit status says whether the target was met."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kv_handover",
        description="Hands requests from a real prefill engine to a real decode engine on CPUs and"
        " takes the time from decode's admission to blocks usable, beside process_vm_readv for the"
        " same descriptors. Takes a minute or two; use the machine for nothing else meanwhile.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=positive, default=15, help="requests that count")
    parser.add_argument("--mib", type=_positive_layers, default=64, help="KV of a request, MiB")
    parser.add_argument(
        "--shared-memory",
        choices=get_args(Sharing),
        default="auto",
        help="copy from memory that both map, or leave the reads to NIXL",
    )
    options = parser.parse_args()
    try:
        found = asyncio.run(measure(options.rounds, options.mib, options.shared_memory))
    except (HandoverFailedError, PeerFailedError, OSError) as failure:
        print(f"no figures: {failure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what was started has been stopped", file=sys.stderr)
        return 130
    ratio = median(handover.ratio for handover in found)
    summary = {
        "num_bytes": found[0].num_bytes,
        "num_descriptors": found[0].num_descriptors,
        "usable_ms": round(median(handover.usable_s for handover in found) * 1e3, 2),
        "read_ms": round(median(handover.read_s for handover in found) * 1e3, 2),
        "vm_read_ms": round(median(handover.vm_read_s for handover in found) * 1e3, 2),
        "ratio": round(ratio, 3),
        "target": TARGET_RATIO,
    }
    print(json.dumps(summary))
    return 0 if ratio >= TARGET_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
