"""Which parallelism two pools may have and still hand KV over, and why not where they may not.

Owns the rules that hold for every model, of vLLM 0.32's NIXL connector and of the point-to-point
one; `kvtransfer.layout` owns those that depend on the model, and says so when two engines meet.
Pure; never imports vLLM.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallelism:
    """How the engines of a pool are divided among ranks."""

    tensor: int
    pipeline: int


def transfer_problem(connector: str, *, prefill: Parallelism, decode: Parallelism) -> str | None:
    """The option that is wrong and the reason, in one line; None where the pools fit."""
    if connector == "nccl":
        return _unequal(prefill, decode)
    for pool, parallelism in (("prefill", prefill), ("decode", decode)):
        if parallelism.pipeline > 1:
            return (
                f"{pool}.engine.pipeline_parallel_size: {parallelism.pipeline} does not go with "
                "transfer.connector nixl, with which KV is read between engines of one stage; "
                "raise tensor_parallel_size instead"
            )
    small, large = sorted((prefill.tensor, decode.tensor))
    if large % small:
        return (
            f"engine.tensor_parallel_size: {prefill.tensor} in prefill and {decode.tensor} in "
            "decode; one must be a multiple of the other, so that each rank's KV heads lie in "
            "whole ranks of the other side"
        )
    return None


def _unequal(prefill: Parallelism, decode: Parallelism) -> str | None:
    for option, sizes in (
        ("tensor_parallel_size", (prefill.tensor, decode.tensor)),
        ("pipeline_parallel_size", (prefill.pipeline, decode.pipeline)),
    ):
        if sizes[0] != sizes[1]:
            return (
                f"engine.{option}: {sizes[0]} in prefill and {sizes[1]} in decode must be the same "
                "with transfer.connector nccl, which pairs ranks one to one; nixl takes other "
                "tensor parallelism on each side"
            )
    return None
