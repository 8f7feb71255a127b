"""The same image, asked about again and again, over two replicas of each pool.

vLLM's front end sends an image once and then only its name, which an engine that has not seen it
cannot follow; a router has many engines behind it.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from forked import forked_context
from kv_engines import ENGINE_ENV
from PIL import Image
from prometheus_client import CollectorRegistry
from vision_model import IMAGE_SIZE, KV_BYTES_PER_TOKEN, write_vision_model
from vllm import AsyncEngineArgs, SamplingParams
from vllm.multimodal.cache import engine_receiver_cache_from_config
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.stats import SchedulerStats

from engine.arguments import engine_args
from engine.channel import connect
from engine.host import EngineHost
from engine.replica import EngineReplica
from kvtransfer.config import Role, kv_transfer_config
from kvtransfer.credentials import Credentials
from kvtransfer.peers import KVPeer
from kvtransfer.stats import pair_deltas
from router.app import send_images_whole
from router.cluster_llm import ClusterLLM
from router.core_client import ClusterCoreClient
from router.metrics import RouterMetrics
from router.policies import POLICIES
from router.pool import Replica
from router.recovery import RecoveryLimits
from router.traffic import TrafficMeter

SECRET = "s"
OPTIONS = {
    "dtype": "float32",
    "block_size": 32,
    "max_model_len": 512,
    "kv_cache_memory_bytes": 2**25,
    "limit_mm_per_prompt": {"image": 1},
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
NUM_TIMES = 4


class Hooks:
    """A phase that tells of its reads, and does nothing else of its own."""

    replica: EngineReplica

    def __getattr__(self, name: str) -> Any:
        return lambda *_: 0

    def stats_seen(self, stats: SchedulerStats) -> None:
        self.replica.add_transfers(pair_deltas(stats.kv_connector_stats))


class NoChecks:
    """No request here has a constraint."""

    async def apply(self, constraint: object) -> None:
        raise AssertionError(constraint)


class Cluster:
    """vLLM's front end over engines of both pools, as a router has them."""

    def __init__(self, model: str) -> None:
        traffic = TrafficMeter(ttft_s=1.0, itl_s=1.0)
        self.core = ClusterCoreClient(
            POLICIES["round_robin"],
            RouterMetrics(CollectorRegistry(), traffic),
            RecoveryLimits(max_moves=0, max_wait_s=10.0, stall_timeout_s=10.0),
            traffic=traffic,
        )
        config = engine_args(model, OPTIONS).create_engine_config()
        send_images_whole(config)
        checks: Any = NoChecks()
        self.llm = ClusterLLM(
            config, self.core, client_priority=(0, 0), max_prompt_logprobs=0, grammars=checks
        )
        self.replicas: list[EngineReplica] = []

    async def start(self, role: Role, model: str, engine_id: str) -> None:
        pool = self.core.prefill if role == "prefill" else self.core.decode
        transfer = kv_transfer_config(role, engine_id=engine_id, lease_s=30, backends=["UCX"])
        args = engine_args(model, {**OPTIONS, "kv_transfer_config": transfer})
        host = await EngineHost.start(args, credentials=Credentials(secret=SECRET))
        peer = KVPeer(engine_id=engine_id, host="127.0.0.1", port=1, tp_size=1)
        hooks = Hooks()
        served = hooks.replica = EngineReplica(host, peer, hooks)
        self.replicas.append(served)
        address = await served.open("127.0.0.1", SECRET)
        replica = Replica(engine_id, pool, on_gone=lambda _: None)
        replica.end, replica.facts = await connect(
            address, secret=SECRET, router_id="r", replica_id=engine_id, owner=replica
        )
        pool.insert(replica)

    def close(self) -> None:
        self.llm.shutdown()
        for served in self.replicas:
            served.close("the test is over")
            served.host.stop()


@contextlib.asynccontextmanager
async def running_cluster(model: str) -> AsyncIterator[Cluster]:
    cluster = Cluster(model)
    try:
        async with asyncio.TaskGroup() as starts:
            for index in "01":
                starts.create_task(cluster.start("prefill", model, f"prefill-{index}"))
                starts.create_task(cluster.start("decode", model, f"decode-{index}"))
        yield cluster
    finally:
        cluster.close()


@contextlib.contextmanager
def bare_vllm(model: str) -> Any:
    plain = {**OPTIONS, "enforce_eager": True}
    plain["distributed_executor_backend"] = "engine.executor.InlineExecutor"
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=model, **plain))
    try:
        yield llm
    finally:
        llm.shutdown()


async def answer(llm: AsyncLLM, image: Image.Image, request_id: str) -> list[int]:
    prompt = "What is to be seen in this picture, and where was it taken? It is"
    asked = {"prompt": prompt, "multi_modal_data": {"image": image}}
    tokens: list[int] = []
    async for output in llm.generate(asked, GREEDY, request_id):
        tokens = list(output.outputs[0].token_ids)
    return tokens


def picture(color: str) -> Image.Image:
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "white")
    image.paste(color, (0, 0, IMAGE_SIZE // 2, IMAGE_SIZE))
    return image


async def test_an_image_is_answered_by_engines_that_have_not_seen_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_vision_model(tmp_path)
    for name, value in ENGINE_ENV.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("vllm.v1.engine.utils.get_mp_context", forked_context)
    colors = ("red", "blue")
    with bare_vllm(str(tmp_path)) as bare:
        expected = [await answer(bare, picture(color), color) for color in colors]
    assert expected[0] != expected[1], "it sees no difference"
    async with running_cluster(str(tmp_path)) as cluster:
        for index in range(NUM_TIMES):
            for color, right in zip(colors, expected, strict=True):
                assert await answer(cluster.llm, picture(color), f"{color}-{index}") == right
        for served in cluster.replicas:
            assert engine_receiver_cache_from_config(served.host.config) is None
        await told_of_reads(cluster)


async def told_of_reads(cluster: Cluster) -> None:
    """Routers know how large the KV is, and what its reads have taken."""
    for replica in (*cluster.core.prefill, *cluster.core.decode):
        assert replica.facts is not None
        assert replica.facts.kv_bytes_per_token == KV_BYTES_PER_TOKEN
    async with asyncio.timeout(10):
        while not list(cluster.core.decode.transfers.measured()):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
