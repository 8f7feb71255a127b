"""Faults that no signal and no network gives, injected beside the model of a real engine."""

import time
from typing import Any

from vllm.distributed.kv_transfer import get_kv_transfer_group

from kvtransfer.extension import WorkerExtension

FAULTY_WORKER = "kv_faults.FaultyWorker"
"""For `worker_extension_cls`."""


class FaultyWorker(WorkerExtension):
    """Mixed into vLLM's worker."""

    def delay_lease_reads(self, seconds: float) -> None:
        """Blocks are read as ever, and the lease so much later: time for it to end."""
        reader = get_kv_transfer_group().connector_worker._lease_reader
        post = type(reader).post

        def post_late(*args: Any) -> Any:
            time.sleep(seconds)
            return post(reader, *args)

        reader.post = post_late

    def fail_reads(self, number: int) -> None:
        """The next reads of blocks fail when they are posted, as with a broken connection."""
        agent = get_kv_transfer_group().connector_worker.nixl_wrapper
        make = type(agent).make_prepped_xfer
        left = number

        def make_or_fail(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left == 0:
                return make(agent, *args, **kwargs)
            left -= 1
            raise ConnectionError("injected")

        agent.make_prepped_xfer = make_or_fail

    def known_kv_peers(self) -> list[str]:
        """The prefill engines of which this one keeps state."""
        worker = get_kv_transfer_group().connector_worker
        return sorted(set(worker._remote_agents) | set(worker._remote_tables))

    def num_handshakes(self) -> int:
        """Handshakes since this was asked for the first time."""
        worker = get_kv_transfer_group().connector_worker
        if not hasattr(worker, "_num_handshakes"):
            worker._num_handshakes = 0
            submit = worker._handshake_initiation_executor.submit

            def counted(*args: Any) -> Any:
                worker._num_handshakes += 1
                return submit(*args)

            worker._handshake_initiation_executor.submit = counted
        count: int = worker._num_handshakes
        return count
