"""What the host adds to vLLM's worker: methods that are called by name, in every rank's process."""

from collections.abc import Iterator
from typing import Any

import torch

from engine.resume import resume_in_model_runner
from kvtransfer import extension


class WorkerExtension(extension.WorkerExtension):
    """Mixed into vLLM's worker. Also has what `kvtransfer` asks of it."""

    def accept_output_tokens(self: Any) -> None:
        """Lets requests bring output tokens with them; see `engine.resume`."""
        resume_in_model_runner(self.vllm_config.model_config.get_vocab_size())

    def kv_cache_bytes(self: Any) -> int:
        """Of this rank, whatever layers share."""
        storages = [tensor.untyped_storage() for tensor in _tensors(self.model_runner.kv_caches)]
        return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def _tensors(caches: Any) -> Iterator[torch.Tensor]:
    """Of each layer there may be one, or several."""
    if isinstance(caches, torch.Tensor):
        yield caches
    else:
        for each in caches:
            yield from _tensors(each)
