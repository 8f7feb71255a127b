"""What the host adds to vLLM's worker: methods that are called by name, in every rank's process."""

from typing import Any

from engine.resume import resume_in_model_runner
from kvtransfer import extension


class WorkerExtension(extension.WorkerExtension):
    """Mixed into vLLM's worker. Also has what `kvtransfer` asks of it."""

    def accept_output_tokens(self: Any) -> None:
        """Lets requests bring output tokens with them; see `engine.resume`."""
        resume_in_model_runner(self.vllm_config.model_config.get_vocab_size())
