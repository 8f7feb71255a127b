"""Replicas without engines: what is sent to them is recorded, what they say is up to the test."""

from dataclasses import dataclass, field
from typing import Any

from vllm import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.serial_utils import MsgpackEncoder

from engine.wire import AddRequest, Kind, LoadReport, ReplicaFacts, StepOutputs
from kvtransfer.peers import KVPeer
from router.core import RouterCore
from router.pool import Pool, Replica
from router.request import RequestState
from router.route_note import NOTE

KV_OF_PREFILL = {"remote_block_ids": [[1, 2]], "remote_engine_id": "p"}


@dataclass
class FakeEnd:
    """Records what the router sends to a replica."""

    sent: list[tuple[Kind, Any]] = field(default_factory=list)
    closed_because: str | None = None
    heard_s: float = 0.0
    is_drained = True

    def send(self, kind: Kind, message: object) -> None:
        # As the connection does, which raises where the message cannot be encoded.
        MsgpackEncoder().encode(message)
        self.sent.append((kind, message))

    def close(self, reason: str) -> None:
        self.closed_because = reason

    async def drained(self) -> None:
        pass

    def added(self) -> list[EngineCoreRequest]:
        return [m.request for _, m in self.sent if isinstance(m, AddRequest)]

    def told(self, kind: Kind) -> list[str]:
        return [request_id for sent, ids in self.sent if sent is kind for request_id in ids]


def replica_facts(replica_id: str, **facts: Any) -> ReplicaFacts:
    """What a replica says of itself; of a typical engine where a test does not care."""
    typical = {
        "engine_id": replica_id,
        "kv": KVPeer(engine_id=replica_id, host="h", port=1, tp_size=1),
        "max_model_len": 100_000,
        "block_size": 128,
        "num_kv_blocks": 1000,
        "max_num_seqs": 64,
    }
    return ReplicaFacts(**{**typical, **facts})


def new_replica(
    pool: Pool,
    replica_id: str,
    *,
    facts: ReplicaFacts | None = None,
    end: Any = None,
    node_id: str | None = None,
) -> Replica:
    """A replica that is connected, and not in the pool yet."""
    facts = facts or replica_facts(replica_id)
    end = end or FakeEnd()
    return Replica(replica_id, pool, end, facts, on_gone=lambda _: None, node_id=node_id)


def join(
    pool: Pool,
    replica_id: str,
    *,
    block_size: int,
    node_id: str | None = None,
    num_dropped_tokens: int = 0,
    kv_bytes_per_token: float | None = None,
) -> Replica:
    """A replica with a cache, which is in the pool from now on."""
    facts = replica_facts(
        replica_id,
        block_size=block_size,
        num_dropped_tokens=num_dropped_tokens,
        kv_bytes_per_token=kv_bytes_per_token,
    )
    replica = new_replica(pool, replica_id, facts=facts, node_id=node_id)
    pool.insert(replica)
    return replica


def end_of(replica: Replica) -> FakeEnd:
    assert isinstance(replica.end, FakeEnd)
    return replica.end


def request(request_id: str = "r", **options: Any) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=request_id,
        prompt_token_ids=[5, 6, 7],
        mm_features=None,
        sampling_params=SamplingParams(**{"max_tokens": 4, "temperature": 0.0, **options}),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def add(core: RouterCore, asked: EngineCoreRequest) -> RequestState:
    """As vLLM's front end does, through the core client."""
    return core.lifecycle.add(asked, NOTE.get())


def step(replica: Replica, *outputs: EngineCoreOutput) -> None:
    replica.step_received(StepOutputs(list(outputs), LoadReport()))


def prefilled(token: int = 9, request_id: str = "r") -> EngineCoreOutput:
    return EngineCoreOutput(
        request_id,
        [token],
        finish_reason=FinishReason.LENGTH,
        kv_transfer_params=dict(KV_OF_PREFILL),
    )


def decoded(token: int, *, ends: bool = False, request_id: str = "r") -> EngineCoreOutput:
    reason = FinishReason.LENGTH if ends else None
    return EngineCoreOutput(request_id, [token], finish_reason=reason)
