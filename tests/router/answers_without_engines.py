"""Builds a router over replicas without engines and prints its answers, in a process of its own.

Run as `python answers_without_engines.py OPTIONS`; with `--whole`, its configuration is the one
that an engine with these options has, as vLLM makes it on a machine that could run that engine.
"""

import asyncio
import json
import sys
from collections.abc import Mapping
from typing import Any
from unittest import mock

import httpx
from core_clusters import Cluster
from fake_replicas import FakeEnd, decoded, prefilled, step
from prometheus_client import CollectorRegistry
from vllm.platforms import current_platform

from engine.arguments import engine_args
from engine.models import resolve_model
from engine.wire import AddRequest, Kind
from router.app import build_openai_app, make_front_end
from router.auditor import Auditor
from router.core_client import ClusterCoreClient
from router.engine_failures import EngineFailures
from router.frontend_config import front_end_config
from router.health import Health
from router.pool import Replica
from router.settings import FrontendSettings

CHAT = {"messages": [{"role": "user", "content": "a b c"}]}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
REQUESTS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "models": ("GET /v1/models", {}),
    "tokens": ("POST /tokenize", CHAT),
    "chat": ("POST /v1/chat/completions", CHAT | {"max_tokens": 3}),
    "choices": ("POST /v1/completions", {"prompt": ["a", "b c"], "n": 2, "max_tokens": 2}),
    "too-long": ("POST /v1/completions", {"prompt": [7] * 600}),
    "too-many-choices": ("POST /inference/v1/generate",
                         {"token_ids": [5, 6], "sampling_params": {"n": 5}}),
    "too-many-logprobs": ("POST /v1/completions", {"prompt": "a", "logprobs": 4}),
    "min-p": ("POST /v1/completions", {"prompt": "a", "min_p": 0.5, "max_tokens": 2}),
    "schema": ("POST /v1/completions",
               {"prompt": "a", "structured_outputs": {"json": SCHEMA}, "max_tokens": 2}),
    "wrong-schema": ("POST /v1/completions",
                     {"prompt": "a", "structured_outputs": {"json": {"type": "no"}}}),
    "thinking": ("POST /v1/chat/completions",
                 CHAT | {"thinking_token_budget": 1, "max_tokens": 2}),
    "embeddings": ("POST /v1/completions", {"prompt_embeds": "", "max_tokens": 2}),
}  # fmt: skip
ITS_OWN = {"id", "created", "request_id", "system_fingerprint"}
"""Keys whose values are those of one answer, or of one configuration."""


class AnsweringEnd(FakeEnd):
    """Computes each prompt to the same token, and writes the same ones until it must stop."""

    def __init__(self, replica: Replica) -> None:
        super().__init__()
        self._replica = replica

    def send(self, kind: Kind, message: object) -> None:
        super().send(kind, message)
        if isinstance(message, AddRequest):
            asyncio.get_running_loop().call_soon(self._answer, message)

    def _answer(self, message: AddRequest) -> None:
        request = message.request
        request_id, params = request.request_id, request.sampling_params
        assert params is not None
        if self._replica.pool.name == "prefill":
            step(self._replica, prefilled(70, request_id))
            return
        for index in range(2, (params.max_tokens or 0) + 1):
            last = index == params.max_tokens
            step(self._replica, decoded(70 + index, ends=last, request_id=request_id))


async def answers(options: dict[str, Any]) -> dict[str, Any]:
    cluster = Cluster()
    for replica in (*cluster.prefill, *cluster.decode):
        replica.end = AnsweringEnd(replica)  # type: ignore[assignment]
    settings = FrontendSettings(
        model=resolve_model("demo"),
        served_name="demo",
        options=options,
        frontend={"enable_scale_out": True},
    )
    front_end = make_front_end(settings, ClusterCoreClient(cluster.core))
    health = Health(
        cluster.core.pools,
        EngineFailures(CollectorRegistry()),
        _nothing_starts,
        is_served=front_end.is_served,
        pairs=cluster.core.pairs,
    )
    auditor = Auditor(cluster.core, front_end.request_ids)
    app = await build_openai_app(front_end, (health.route(), auditor.route()))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        given = {}
        for name, (line, body) in REQUESTS.items():
            method, _, path = line.partition(" ")
            answer = await client.request(method, path, json=body or None, timeout=300)
            given[name] = [answer.status_code, _comparable(answer.json())]
    return given


async def _nothing_starts() -> Mapping[str, str]:
    return {}


def _comparable(answer: Any) -> Any:
    if isinstance(answer, dict):
        return {key: _comparable(each) for key, each in answer.items() if key not in ITS_OWN}
    return [_comparable(each) for each in answer] if isinstance(answer, list) else answer


def whole_config(model: str, options: Mapping[str, Any]) -> Any:
    return engine_args(model, options).create_engine_config()


def main() -> None:
    config = whole_config if "--whole" in sys.argv else front_end_config
    with mock.patch("router.app.front_end_config", config):
        given = asyncio.run(answers(json.loads(sys.argv[1])))
    print(json.dumps({"platform": type(current_platform).__name__, "answers": given}))


if __name__ == "__main__":
    main()
