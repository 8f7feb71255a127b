"""What a client of an engine core can ask of the connector beside the model.

Owns the names under which `collective_rpc` finds it. Never decides anything.
"""

from vllm.distributed import get_world_group
from vllm.distributed.kv_transfer import get_kv_transfer_group


class WorkerExtension:
    """Mixed into vLLM's worker, which finds its methods by name."""

    def release_kv_blocks(self, request_ids: list[str]) -> None:
        get_kv_transfer_group().release(request_ids)

    def warm_up_kv_peer(
        self, engine_id: str, host: str, port: int, tp_size: int
    ) -> tuple[int, bool, str | None]:
        done, problem = get_kv_transfer_group().warm_up(engine_id, host, port, tp_size)
        return get_world_group().rank_in_group, done, problem

    def num_dropped_tokens(self) -> int:
        num_tokens: int = get_kv_transfer_group().num_dropped_tokens()
        return num_tokens

    def forget_kv_peer(self, engine_id: str) -> None:
        get_kv_transfer_group().forget(engine_id)
